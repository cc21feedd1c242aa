// The explorer of the page: reads the controls, searches, and shows. What is computed is in explorer.js.

import { Charts } from "./charts.js";
import { costCurve, search, unpack } from "./explorer.js";
import { contextLabel, costText, counted, decimals, long, percent, range, regretText, short, span, tenths, three } from "./numbers.js";

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
  batch: { ...octaves, whole: true, said: (x) => counted(x, "request") },
  decode_share: { ...identity, said: (x) => `${Math.round(100 * x)} percent` },
};
const CHOICES = ["study", "cost", "device", "param_dtype", "cache_dtype", "convention", "flops", "limit"].filter((name) => $(name));
const COUNTED = ["z", "flops", "memory"]; // costs that a convention counts
let model = studies[0];
let state = {};

/** What a study is asked first. */
function firstQuestion(study) {
  const { context, loss, cost } = studies[study].defaults;
  const served = Object.values(studies[study].objectives).find((one) => one.serving)?.serving;
  const own = studies[study].objectives[cost];
  const z = studies[study].objectives.z;
  return {
    study: String(study),
    context,
    loss,
    cost,
    lam: z.lam,
    convention: studies[study].defaults.convention,
    flops: (own.convention ?? z.convention).flops,
    device: (own.serving ?? served).device,
    batch: (own.serving ?? served).batch,
    decode_share: (own.serving ?? served).decode_share,
    param_dtype: studies[study].defaults.param_dtype,
    cache_dtype: studies[study].defaults.cache_dtype,
    limit: "",
  };
}

/** Whether memory is counted, and in bytes: precisions matter. */
const inBytes = () => ["z", "memory"].includes(state.cost) && model.conventions[state.convention].memory === "bytes";

/** The question of the controls, as explorer.js takes it. */
function query() {
  const objective = structuredClone(model.objectives[state.cost]);
  const bytes = { param_bytes: model.dtype_bytes[state.param_dtype], cache_bytes: model.dtype_bytes[state.cache_dtype] };
  const ones = { param_bytes: 1, cache_bytes: 1 };
  const twos = { param_bytes: 2, cache_bytes: 2 };
  if (objective.serving) {
    const other = objective.serving.device === state.device ? {} : model.devices[state.device];
    Object.assign(objective.serving, other, bytes, { batch: state.batch, decode_share: state.decode_share });
  } else if (COUNTED.includes(state.cost)) {
    objective.convention = { ...model.conventions[state.convention], flops: state.flops };
    Object.assign(objective, inBytes() ? bytes : ones);
    if (state.cost === "z") objective.lam = state.lam;
    if (state.cost === "memory") objective.unit = objective.convention.memory;
    if (state.cost === "flops") objective.label = model.flops_rules[state.flops];
  }
  const own = objective.serving ?? { n_devices: 1, batch: 1, ...(inBytes() ? bytes : twos) };
  const limit = state.limit && { ...model.serving, ...own, ...model.devices[state.limit] };
  return { context: state.context, loss: state.loss, objective, memory_limit: limit || null };
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
    for (const [name, usual] of [["device"], ["n_devices", 1], ["batch", 1], ["decode_share", 0.1], ["efficiency", 1]]) add(name, serving[name], usual);
    if (serving.price === "as given") add("usd_per_hour", serving.usd_per_hour);
  }
  if (serving || inBytes()) {
    for (const name of ["param_dtype", "cache_dtype"]) add(name, state[name], "bfloat16");
  }
  add("tokens", (training ?? objective).tokens);
  add("served_tokens", objective.served_tokens);
  if (state.limit) add("fits", state.limit);
  return `${data.command} ${flags.map(([name, value]) => `--${name} ${value}`).join(" ")}`;
}

/** Shows the state in the controls, all or but the one that is being used. */
function showControls(but = null) {
  for (const [name, slider] of Object.entries(SLIDERS)) {
    if (but !== $(name)) {
      $(name).value = String(state[name]);
      refuse(name, "");
    }
    if (but !== $(`${name}-slider`)) $(`${name}-slider`).value = String(slider.to(state[name]));
    $(`${name}-slider`).setAttribute("aria-valuetext", slider.said(state[name]));
  }
  for (const name of CHOICES) $(name).value = state[name];
  const shown = inBytes() ? [state.cost, "bytes"] : [state.cost];
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
  const value = exact ? event.target.valueAsNumber : slider.from(event.target.valueAsNumber);
  const { min, max } = $(name);
  const inside = value >= Number(min) && value <= Number(max) && (!slider.whole || Number.isInteger(value));
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
  else if (Number.isNaN(row.saving)) fact("saving", "Saving against Llama 3's heads", "unknown", result.baseline === null ? `they don't fit ${state.limit}` : "no law of theirs");
  else fact("saving", "Saving against Llama 3's heads", tenths(row.saving), range(row.saving_interval, tenths));
  if (second === null) fact("runner-up", "Next", "none", "nothing else reaches this loss");
  else fact("runner-up", "Next", model.heads[second].label, `${regretText(rows[second].expected_regret, model.largest_regret)} extra on average`);
}

const capital = (text) => text[0].toUpperCase() + text.slice(1);

function sentence(asked, result) {
  const { rows, best } = result;
  const where = `Served at ${contextLabel(asked.context)} tokens, a loss of ${asked.loss}`;
  if (best === null && asked.memory_limit !== null) return `${where} is not reached by any of these heads in the memory of ${state.limit}.`;
  if (best === null) return `${where} is not reached by any of these heads at any size: it is at or below the entropy E.`;
  return `${where} costs least with ${headsInWords(model.heads[best])}, at ${long(rows[best].n_params)} parameters.`;
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
      Number.isFinite(row.cost) ? text(row.cost) : reached ? "too large" : "",
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
      if (value >= Number($(name).min) && value <= Number($(name).max)) state[name] = value;
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
