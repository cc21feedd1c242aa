// The explorer of the page: reads the controls, searches, and shows. What is computed is in explorer.js.

import { Charts } from "./charts.js";
import { costCurve, search, unpack } from "./explorer.js";
import { contextLabel, costText, counted, decimals, long, percent, range, regretText, seconds, short, span, tenths, three } from "./numbers.js";

const $ = (id) => document.getElementById(id);
const data = JSON.parse($("payload").textContent);
const studies = data.studies.map(unpack);
const charts = new Charts(data.charts);
const AT_REST_MS = 700; // after the last change the live region speaks and the address is written

function headsInWords(heads) {
  const query = heads.n_heads === null ? `one query head per ${model.head_dim} of the width` : counted(heads.n_heads, "query head");
  if (heads.n_kv_heads < 0) return `${query} and a key/value head for ${heads.n_kv_heads === -1 ? "each" : `every ${-heads.n_kv_heads} of them`}`;
  return `${query} and ${counted(heads.n_kv_heads, "key/value head")}`;
}

// ------------------------------------------------------------------------------------------------------------- controls

const identity = { to: (x) => x, from: (x) => x };
const octaves = { to: Math.log2, from: (x) => Math.round(2 ** x) };
const SLIDERS = {
  context: { ...octaves, whole: true, said: (x) => `${contextLabel(x)} tokens` },
  loss: { ...identity, said: (x) => `${x} nats per token` },
  lam: { ...identity, said: (x) => String(x) },
  batch: {
    // A number of requests, or a word: left of one request is the best number.
    words: ["best", "fits"],
    to: (x) => (typeof x === "string" ? -0.25 : Math.log2(x)),
    from: (x) => (x < 0 ? "best" : octaves.from(x)),
    whole: true,
    said: (x) => ({ best: "the best number of requests", fits: "as many requests as fit" })[x] ?? counted(x, "request"),
  },
  decode_share: { ...identity, said: (x) => `${Math.round(100 * x)} percent` },
};
const CHOICES = ["study", "cost", "device", "parallelism", "param_dtype", "cache_dtype", "convention", "flops", "limit"].filter((name) => $(name));
const COUNTED = ["z", "flops", "memory"]; // costs that a convention counts
let model = studies[0];
let state = {};

/** What a study is asked first. */
function firstQuestion(study) {
  const { context, loss, cost } = studies[study].defaults;
  const own = studies[study].objectives[cost];
  const serving = own.serving ?? studies[study].objectives.latency.serving;
  const z = studies[study].objectives.z;
  return {
    study: String(study),
    context,
    loss,
    cost,
    lam: z.lam,
    convention: studies[study].defaults.convention,
    flops: (own.convention ?? z.convention).flops,
    device: serving.device,
    parallelism: String(serving.parallelism),
    batch: serving.batch,
    decode_share: serving.decode_share,
    param_dtype: studies[study].defaults.param_dtype,
    cache_dtype: studies[study].defaults.cache_dtype,
    limit: "",
  };
}

/** Whether memory is counted, and in bytes: precisions matter. */
const inBytes = () => ["z", "memory"].includes(state.cost) && model.conventions[state.convention].memory === "bytes";

/** An objective on the device of the controls, served as they say. Efficiencies that were given stay, others are the device's own. */
function serve(objective) {
  const { serving } = objective;
  const { device: asked, efficiency } = serving;
  const own = model.devices[asked];
  const { peaks, efficiencies, training_mfu: mfu, ...device } = model.devices[state.device];
  if (asked !== state.device) Object.assign(serving, device);
  if (efficiency.source === own.efficiencies.bfloat16.source) serving.efficiency = efficiencies[state.param_dtype];
  if (objective.training_mfu === own.training_mfu) objective.training_mfu = mfu;
  serving.peak_flops = peaks[state.param_dtype];
  serving.attention_flops = peaks[efficiency.bound ? state.cache_dtype : "bfloat16"];
  serving.param_bytes = model.dtype_bytes[state.param_dtype];
  serving.parallelism = state.parallelism.includes(",") ? state.parallelism.split(",").map(Number) : state.parallelism;
  for (const name of ["cache_dtype", "batch", "decode_share"]) serving[name] = state[name];
}

/** The question of the controls, as explorer.js takes it. */
function query() {
  const objective = structuredClone(model.objectives[state.cost]);
  const bytes = { param_bytes: model.dtype_bytes[state.param_dtype], cache_bytes: model.dtype_bytes[state.cache_dtype] };
  if (objective.serving) serve(objective);
  else if (COUNTED.includes(state.cost)) {
    objective.convention = { ...model.conventions[state.convention], flops: state.flops };
    Object.assign(objective, inBytes() ? bytes : { param_bytes: 1, cache_bytes: 1 });
    if (state.cost === "z") objective.lam = state.lam;
    if (state.cost === "memory") objective.unit = objective.convention.memory;
    if (state.cost === "flops") objective.label = model.flops_rules[state.flops];
  }
  return { context: state.context, loss: state.loss, objective, memory_limit: state.limit ? limitOn(state.limit, objective.serving) : null };
}

/** The memory of a device that a model must fit, as the objective serves it; one request at a time where that is not asked. */
function limitOn(device, serving) {
  const { memory_bytes: bytes } = model.devices[device];
  const limit = { ...model.serving, device, memory_bytes: bytes };
  if (serving) return { ...limit, n_devices: serving.n_devices, batch: serving.batch, param_bytes: serving.param_bytes, cache_dtype: serving.cache_dtype };
  return inBytes() ? { ...limit, param_bytes: model.dtype_bytes[state.param_dtype], cache_dtype: state.cache_dtype } : limit;
}

/** The same question as a command: what differs from its defaults. */
function command(asked) {
  const { objective } = asked;
  const { serving, training } = objective;
  const flags = [["context", state.context], ["loss", state.loss], ["cost", state.cost]];
  const add = (name, value, usual) => value !== undefined && value !== null && value !== usual && flags.push([name, value]);
  if (Number(state.study) > 0) add("train_context", model.context_trained);
  if (COUNTED.includes(state.cost)) add("convention", state.convention, "own");
  if (["z", "flops"].includes(state.cost)) add("flops", state.flops, model.conventions[state.convention].flops);
  add("lam", objective.lam, 0.9);
  add("alpha", objective.alpha, 1 / 2);
  add("beta", objective.beta, 1 / 3);
  if (serving) {
    for (const [name, usual] of [["device"], ["n_devices", 1], ["parallelism", "best"], ["batch", "best"], ["decode_share", 0.1], ["ttft"], ["tpot"]]) add(name, serving[name], usual);
    if (serving.disaggregated) flags.push(["disaggregated"]);
    const { bound, matmul, source } = serving.efficiency;
    if (bound || source === "as given") add("efficiency", bound ? "bound" : matmul);
    add("usd_per_hour", serving.usd_per_hour, model.devices[state.device].usd_per_hour);
    add("training_mfu", objective.training_mfu, model.devices[state.device].training_mfu);
  }
  if (serving || inBytes()) {
    for (const name of ["param_dtype", "cache_dtype"]) add(name, state[name], "bfloat16");
  }
  add("tokens", (training ?? objective).tokens);
  add("served_tokens", objective.served_tokens);
  if (state.limit) add("fits", state.limit);
  return `${data.command} ${flags.map(([name, value]) => (value === undefined ? `--${name}` : `--${name} ${value}`)).join(" ")}`;
}

/** Shows the state in the controls, all or but the one that is being used. */
function showControls(but = null) {
  for (const [name, slider] of Object.entries(SLIDERS)) {
    if (but !== $(name)) {
      const word = slider.words?.includes(state[name]);
      $(name).value = word ? "" : String(state[name]);
      $(name).placeholder = word ? state[name] : "";
      refuse(name, "");
    }
    if (but !== $(`${name}-slider`)) $(`${name}-slider`).value = String(slider.to(state[name]));
    $(`${name}-slider`).setAttribute("aria-valuetext", slider.said(state[name]));
  }
  for (const name of CHOICES) $(name).value = state[name];
  const several = model.objectives[state.cost].serving?.n_devices > 1;
  const shown = [state.cost, inBytes() && "bytes", several && "several"];
  for (const part of document.querySelectorAll("[data-for]")) part.hidden = !shown.some((one) => part.dataset.for.split(" ").includes(one));
}

function refuse(name, why) {
  $(name).toggleAttribute("aria-invalid", false);
  if (why) $(name).setAttribute("aria-invalid", "true");
  $(`${name}-problem`).textContent = why;
}

function read(event) {
  const name = event.target.id.replace("-slider", "");
  if (!(name in SLIDERS)) {
    state[name] = event.target.value;
    if (name === "study") openStudy(Number(state.study));
    if (name === "convention") state.flops = model.conventions[state.convention].flops;
    return ask();
  }
  const slider = SLIDERS[name];
  const exact = event.target.type === "number";
  const { value: text, valueAsNumber: number } = event.target;
  const value = !exact ? slider.from(number) : slider.words && text === "" && !event.target.validity.badInput ? slider.words[0] : number;
  const { min, max } = $(name);
  const inside = slider.words?.includes(value) || (value >= Number(min) && value <= Number(max) && (!slider.whole || Number.isInteger(value)));
  if (!inside) {
    const kind = slider.whole ? "a whole number" : "a number";
    return refuse(name, `${kind} from ${decimals[slider.whole ? 0 : 3].format(min)} to ${decimals[slider.whole ? 0 : 3].format(max)}`);
  }
  refuse(name, "");
  state[name] = value;
  ask(event.target);
}

/** Makes a study the one that is asked: its heads, its range of losses. */
function openStudy(index) {
  model = studies[index];
  const kept = { ...state };
  state = firstQuestion(index);
  const [low, high] = model.ranges.loss;
  for (const input of [$("loss"), $("loss-slider")]) [input.min, input.max] = [low, high];
  [$("context").min, $("context").max] = model.ranges.context;
  if (Number.isFinite(kept.context)) Object.assign(state, kept, { study: String(index), loss: Math.min(high, Math.max(low, kept.loss)) });
  charts.arrange(model);
  openRanking();
}

// ------------------------------------------------------------------------------------------------------------------ words

const write = (id, text) => {
  const node = $(id);
  if (node.textContent !== text) node.textContent = text;
};

function fact(name, title, value, range) {
  write(`fact-${name}-name`, title);
  write(`fact-${name}`, value);
  write(`fact-${name}-range`, range);
}

function showFacts(asked, result) {
  const { rows, best, runner_up: second } = result;
  const text = costText(asked.objective);
  if (best === null) {
    for (const name of ["probability", "params", "cost", "saving", "runner-up"]) fact(name, "", "", "");
    return;
  }
  const row = rows[best];
  const draws = decimals[0].format(Math.round((1 - result.not_reached) * model.draws.count));
  fact("probability", "Cheapest in", percent(row.probability), `of ${draws} draws`);
  fact("params", "Parameters N*", short(row.n_params), range(row.n_params_interval, short));
  fact("cost", capital(asked.objective.label), text(row.cost), range(row.cost_interval, text) + (/^(|seconds|US dollars)$/.test(asked.objective.unit) ? "" : `, ${asked.objective.unit}`));
  if (model.baseline === null) fact("saving", "Saving against Llama 3's heads", "unknown", "they are not among the laws");
  else if (best === model.baseline) fact("saving", "Saving against Llama 3's heads", "none", "they are the cheapest");
  else if (Number.isNaN(row.saving)) fact("saving", "Saving against Llama 3's heads", "unknown", result.baseline === null ? "they can't be served so" : "no law of theirs");
  else fact("saving", "Saving against Llama 3's heads", tenths(row.saving), range(row.saving_interval, tenths));
  if (second === null) fact("runner-up", "Next", "none", "nothing else reaches this loss");
  else fact("runner-up", "Next", model.heads[second].label, `${regretText(rows[second].expected_regret, model.largest_regret)} extra on average`);
}

const capital = (text) => text[0].toUpperCase() + text.slice(1);

function sentence(asked, result) {
  const { rows, best } = result;
  const where = `Served at ${contextLabel(asked.context)} tokens, a loss of ${asked.loss}`;
  if (best === null && rows.some((row) => Number.isFinite(row.n_params))) {
    const whys = new Set(rows.filter((row) => Number.isFinite(row.n_params)).map(obstacle));
    return `${where} is reached, but not as asked: with every one of these heads it is ${[...whys].join(", or ")}.`;
  }
  if (best === null) return `${where} is not reached by any of these heads at any size: it is at or below the entropy E.`;
  return `${where} costs least with ${headsInWords(model.heads[best])}, at ${long(rows[best].n_params)} parameters.`;
}

/** Why a size that reaches the loss has no cost. */
const WHY_NOT = { heads: "not divided so", batch: "not divided so", memory: "too large", ttft: "too slow", tpot: "too slow" };
const obstacle = (row) => WHY_NOT[row.served?.obstacle] ?? "too large";

/** How the answer is served, as words.py says it. */
function servedText({ serving }, result) {
  const how = result.best === null ? null : result.rows[result.best].served;
  if (!how || how.obstacle !== null) return "";
  const { n_devices: count, device, usd_per_hour: price, efficiency } = serving;
  const parts = ["heads", "sequences", "context"].map((name, i) => how.layout[i] > 1 && `${name} over ${how.layout[i]}`).filter(Boolean);
  const cost = (kind, usd) => (price === null ? "" : `; a million ${kind} tokens cost $${three(usd)}`);
  const said = [`Served on ${count} ${device}${parts.length ? ` (${parts.join(", ")})` : ""}, ${counted(how.batch, "request")} at once${serving.disaggregated ? "; prompts are read on others" : ""}.`];
  if (!Number.isNaN(how.ttft)) said.push(`The first token comes after ${seconds(how.ttft)} (mostly ${data.limited_by[how.prefill_limit]})${cost("input", how.usd_per_million_input)}.`);
  if (!Number.isNaN(how.tpot)) said.push(`Each generated token takes ${seconds(how.tpot)} (a step is mostly ${data.limited_by[how.decode_limit]})${cost("output", how.usd_per_million_output)}.`);
  said.push(`Efficiencies: ${efficiency.source}${/[.!?]$/.test(efficiency.source) ? "" : "."}`);
  if (price !== null) said.push(`Price: $${decimals[2].format(price)} an hour and device, ${serving.price}.`);
  return said.join(" ");
}

function warnings(asked, result) {
  const said = [];
  if (result.not_reached > 0) said.push(`In ${percent(result.not_reached)} of the draws no head configuration reaches this loss at any size.`);
  if (result.best === null) return said;
  const { beyond, n_params: n } = result.rows[result.best];
  if (beyond !== 1) {
    const [low, high] = model.trained[result.best];
    said.push(n > high ? `N* is ${three(beyond)} times the largest size that was trained (${short(high)}).` : `N* is ${three(beyond)} times below the smallest size that was trained (${short(low)}).`);
  }
  if (result.rows[result.best].probability < 0.5) said.push("No heads are the cheapest in most draws: several are about as good.");
  return said;
}

let cells = [];

function openRanking() {
  const rows = model.heads.slice(0, model.n_candidates).map(() => {
    const row = document.createElement("tr");
    for (let i = 0; i < 10; i++) {
      const cell = document.createElement(i ? "td" : "th");
      if (i) cell.className = [4, 7, 9].includes(i) ? "range" : "right";
      else cell.scope = "row";
      row.append(cell);
    }
    return row;
  });
  $("ranking").replaceChildren(...rows);
  cells = rows.map((row) => [...row.children]);
}

function showRanking(asked, result) {
  const cost = asked.objective;
  const text = costText(cost);
  write("ranking-cost", cost.unit === "US dollars" ? "US dollars" : cost.unit || "Z");
  result.order.forEach((h, i) => {
    const row = result.rows[h];
    const reached = Number.isFinite(row.n_params);
    const saves = Number.isFinite(row.saving) && h !== model.baseline;
    const shown = [
      model.heads[h].label,
      Number.isNaN(row.probability) ? "" : percent(row.probability),
      regretText(row.expected_regret, model.largest_regret),
      reached ? `${short(row.n_params)}${row.beyond === 1 ? "" : "*"}` : "none",
      reached ? span(row.n_params_interval, short) : "",
      reached ? `${row.n_layers.toFixed(1)} × ${decimals[0].format(row.d_model)}` : "",
      Number.isFinite(row.cost) ? text(row.cost) : reached ? obstacle(row) : "",
      Number.isFinite(row.cost) ? span(row.cost_interval, text) : "",
      saves ? tenths(row.saving) : "",
      saves ? span(row.saving_interval, tenths) : "",
    ];
    shown.forEach((value, k) => {
      if (cells[i][k].textContent !== value) cells[i][k].textContent = value;
    });
    cells[i][0].parentNode.className = h === result.best ? "best" : "";
  });
}

let rest = 0;
let used = false; // whether a control was touched

function showWords(asked, result) {
  const said = sentence(asked, result);
  write("sentence", said);
  showFacts(asked, result);
  write("served", servedText(asked.objective, result));
  const care = warnings(asked, result);
  $("explorer-care").hidden = care.length === 0;
  if (care.join() !== $("explorer-warnings").dataset.said) {
    $("explorer-warnings").replaceChildren(...care.map((line) => Object.assign(document.createElement("li"), { textContent: line })));
    $("explorer-warnings").dataset.said = care.join();
  }
  write("command", command(asked));
  clearTimeout(rest);
  const sure = result.best === null ? "" : ` Cheapest in ${percent(result.rows[result.best].probability)} of the draws.`;
  rest = setTimeout(() => {
    write("live", said + sure + (care.length ? ` ${care.join(" ")}` : ""));
    if (used) writeAddress();
  }, AT_REST_MS);
}

// ------------------------------------------------------------------------------------------------------------------ running

let frame = 0; // that is waited for: until then questions are collected
let waiting = false;

/** Answers the question of the controls: at once, and then once a frame however many events there are. */
function ask(but = null) {
  used = true;
  showControls(but);
  if (frame !== 0) {
    waiting = true;
    return;
  }
  answer();
  frame = requestAnimationFrame(() => {
    frame = 0;
    if (waiting) {
      waiting = false;
      ask(but);
    }
  });
}

function answer() {
  const asked = query();
  const result = search(model, asked);
  showWords(asked, result);
  showRanking(asked, result);
  charts.show(model, asked, result);
  return result;
}

/** Puts the question into the address: a link to this page opens with it. */
function writeAddress() {
  const parts = Object.entries(state).map(([name, value]) => `${name}=${value}`);
  history.replaceState(null, "", `#ask:${parts.join("&")}`);
}

/** Takes the question that is in the address, as far as there is one; whether there was. */
function readAddress() {
  if (!location.hash.startsWith("#ask:")) return false;
  const given = new URLSearchParams(location.hash.slice(5));
  const study = Number(given.get("study") ?? state.study);
  if (studies[study] && study !== Number(state.study)) openStudy(study);
  for (const [name, text] of given) {
    if (name in SLIDERS) {
      const value = Number(text);
      if (SLIDERS[name].words?.includes(text)) state[name] = text;
      else if (value >= Number($(name).min) && value <= Number($(name).max)) state[name] = value;
    } else if (CHOICES.includes(name) && [...$(name).options].some((one) => one.value === text)) state[name] = text;
  }
  return true;
}

await charts.open();
openStudy(0);
readAddress();
showControls();
answer();
$("explorer-form").addEventListener("input", read);
$("reset").addEventListener("click", () => {
  state = firstQuestion(Number(state.study));
  ask();
});
addEventListener("hashchange", () => {
  if (!readAddress()) return;
  ask();
  $("explorer").scrollIntoView();
  $("sentence").focus({ preventScroll: true });
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  charts.color();
  answer();
});
addEventListener("beforeprint", () => charts.drawAll());
// For the browser's console, and for tests: the search by hand.
globalThis.gqa = { answer, charts: charts.charts, costCurve, query, regretText, search, studies };
