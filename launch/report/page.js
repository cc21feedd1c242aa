// The explorer of the page: reads the controls, looks the answer up, and shows it. The map is read by explorer.js.

import { Charts } from "./charts.js";
import { costCurves, look, unpack } from "./explorer.js";
import { amount, amounts, contextLabel, counted, decimals, long, moreText, percent, range, savingBetween, savingText, seconds, size, sizes, three, unitText, usd } from "./numbers.js";

const $ = (id) => document.getElementById(id);
const data = JSON.parse($("payload").textContent);
const studies = await Promise.all(data.studies.map(async (study) => ({ ...study, map: await unpack(study.map) })));
const charts = new Charts();
const AT_REST_MS = 700; // after the last change the live region speaks and the address is written

// ------------------------------------------------------------------------------------------------------------- controls

const SLIDERS = {
  context: { to: Math.log2, from: (x) => Math.round(2 ** x), whole: true, said: (x) => `${contextLabel(x)} tokens` },
  loss: { to: (x) => x, from: (x) => x, said: (x) => `${x} nats per token` },
};
const CHOICES = ["study", "cost", "device"].filter((name) => $(name));
let study = studies[0];
let state = {};

/** What a study is asked first. */
const firstQuestion = (index) => ({ study: String(index), ...studies[index].first });

/** The goal of the controls: a cost, on the device that is chosen where it is of one. */
function goal() {
  const { goals } = study.map;
  const ofCost = goals.filter((one) => one.cost === state.cost);
  return ofCost.find((one) => one.device === state.device) ?? ofCost[0] ?? goals[0];
}

const query = () => ({ context: state.context, loss: state.loss, goal: goal() });

/** The same question as a command. */
function command(asked) {
  const trained = Number(state.study) > 0 ? ` --train_context ${study.context_trained}` : "";
  return `${data.command} --context ${asked.context} --loss ${asked.loss}${trained} ${asked.goal.flags}`;
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
  const devices = new Set(study.map.goals.filter((one) => one.cost === state.cost && one.device !== null).map((one) => one.device));
  if (devices.size > 0 && !devices.has(state.device)) state.device = [...devices][0];
  for (const option of $("device").options) option.hidden = option.disabled = !devices.has(option.value);
  $("device").closest(".control").hidden = devices.size === 0;
  for (const name of CHOICES) $(name).value = state[name];
}

function refuse(name, why) {
  if (why) $(name).setAttribute("aria-invalid", "true");
  else $(name).removeAttribute("aria-invalid");
  $(`${name}-problem`).textContent = why;
}

function read(event) {
  const name = event.target.id.replace("-slider", "");
  if (!(name in SLIDERS)) {
    state[name] = event.target.value;
    if (name === "study") openStudy(Number(state.study));
    return ask();
  }
  const slider = SLIDERS[name];
  const number = event.target.valueAsNumber;
  const value = event.target.type === "number" ? number : slider.from(number);
  const { min, max } = $(name);
  if (!(value >= Number(min) && value <= Number(max) && (!slider.whole || Number.isInteger(value)))) {
    const [kind, digits] = slider.whole ? ["a whole number", 0] : ["a number", 3];
    return refuse(name, `${kind} from ${decimals[digits].format(min)} to ${decimals[digits].format(max)}`);
  }
  refuse(name, "");
  state[name] = value;
  ask(event.target);
}

/** Makes a study the one that is asked: its heads, its range of losses and contexts, its goals. */
function openStudy(index) {
  study = studies[index];
  const kept = { ...state };
  state = firstQuestion(index);
  const { losses, contexts, goals } = study.map;
  const [low, high] = [losses[0], losses.at(-1)];
  for (const input of [$("loss"), $("loss-slider")]) [input.min, input.max] = [low, high];
  [$("context").min, $("context").max] = [contexts[0], contexts.at(-1)];
  [$("context-slider").min, $("context-slider").max] = [contexts[0], contexts.at(-1)].map(Math.log2);
  if (Number.isFinite(kept.context)) {
    const costs = goals.map((one) => one.cost);
    Object.assign(state, kept, { study: String(index), loss: Math.min(high, Math.max(low, kept.loss)) });
    if (!costs.includes(state.cost)) state.cost = studies[index].first.cost;
  }
  openRanking();
}

// ------------------------------------------------------------------------------------------------------------------ words

const write = (id, text) => {
  const node = $(id);
  if (node.textContent !== text) node.textContent = text;
};

function fact(name, title, value, note) {
  write(`fact-${name}-name`, title);
  write(`fact-${name}`, value);
  write(`fact-${name}-range`, note);
}

const capital = (text) => text[0].toUpperCase() + text.slice(1);
const shapeText = (row) => `${decimals[1].format(row.n_layers)} × ${decimals[0].format(row.d_model)}`;

function showFacts({ goal }, { rows, best, runner_up: second, order }) {
  if (best === null) {
    for (const name of ["probability", "params", "shape", "cost", "saving", "runner-up"]) fact(name, "", "", "");
    return;
  }
  const { heads, largest_regret } = study.map;
  const row = rows[best];
  const { unit } = goal;
  const count = order.filter((h) => Number.isFinite(rows[h].cost)).length;
  fact("probability", "Probability", row.far ? "a guess" : percent(row.probability), row.far ? "too far from what was trained" : count === 1 ? "the only heads that can be chosen here" : `that it is the cheapest of ${count}`);
  fact("params", "Parameters N*", size(row.n_params), range(sizes(row.n_params_interval)));
  fact("shape", "Layers × width", shapeText(row), `width / layers = ${decimals[row.ratio < 100 ? 1 : 0].format(row.ratio)}${data.shapes && `, ${data.shapes}`}`);
  fact("cost", capital(goal.label), amount(row.cost, unit), range(amounts(row.cost_interval, unit)) + unitText(unit));
  const against = "Against Llama 3's heads";
  if (Number.isNaN(row.saving)) fact("saving", against, "unknown", "they have no cost here");
  else {
    const between = savingBetween(row.saving_interval, largest_regret);
    fact("saving", against, savingText(row.saving, largest_regret), [range(between), data.against].filter(Boolean).join("; "));
  }
  if (second === null) fact("runner-up", "Next", "none", "no other heads can be chosen here");
  else fact("runner-up", "Next", heads[second].label, moreSaid(rows[second]));
}

const moreSaid = (row) => {
  const text = moreText(row.more);
  return text && `costs ${text}${Number.isNaN(row.expected_regret) ? "" : " on average"}`;
};

function sentence(asked, { rows, best }) {
  const where = `Served at ${contextLabel(asked.context)} tokens, a loss of ${asked.loss}`;
  if (best !== null) return `${where} costs least with ${study.map.heads[best].words}, at ${long(rows[best].n_params)} parameters.`;
  if (rows.some((row) => Number.isFinite(row.n_params))) return `${where} is reached, but not as asked: no model of these heads can be served so.`;
  return `${where} is not reached by any of these heads at any size.`;
}

/** How the answer is served, as words.py says it. */
function servedText({ goal }, { rows, best }) {
  const how = best === null ? null : rows[best].served;
  if (!how || !Number.isFinite(how.batch)) return "";
  const { on, others, closing } = goal.served;
  const cost = (kind, dollars) => (Number.isFinite(dollars) ? `; a million ${kind} tokens cost ${usd(dollars)}` : "");
  const said = [`Served on ${on}${how.layout && ` (${how.layout})`}, ${counted(Math.round(how.batch), "request")} at once${others ? "; prompts are read on others" : ""}.`];
  if (Number.isFinite(how.ttft)) said.push(`The first token comes after ${seconds(how.ttft)} (mostly ${how.prefill_limit})${cost("input", how.usd_per_million_input)}.`);
  if (Number.isFinite(how.tpot)) said.push(`Each generated token takes ${seconds(how.tpot)} (a step is mostly ${how.decode_limit})${cost("output", how.usd_per_million_output)}.`);
  return `${said.join(" ")} ${closing}`;
}

function warnings(asked, { rows, best, order }) {
  const { heads } = study.map;
  const said = [];
  const between = order.filter((h) => rows[h].edge).map((h) => heads[h].label);
  if (between.length > 0) said.push(`${between.join(", ")}: at the edge of what can be served so, and not compared here. Ask the command line.`);
  if (best === null) return said;
  const { beyond, far, n_params: n, probability, steps } = rows[best];
  if (beyond !== 1) {
    const [low, high] = heads[best].trained;
    const where = n > high ? `the largest size that was trained (${size(high)})` : `below the smallest size that was trained (${size(low)})`;
    said.push(`N* is ${three(beyond)} times ${where}${far ? ": a guess, so no probability is given" : ""}.`);
  }
  if (probability < 0.5) said.push("No heads are the cheapest in most draws: several are about as good.");
  if (steps) said.push("How many requests are served at once changes in steps here, and the cost with it: it is read off between two of them. The command line has it exactly.");
  if (!study.map.contexts.includes(asked.context)) said.push("Between two contexts of the map shapes and probabilities are approximate.");
  return said;
}

let cells = [];

function openRanking() {
  const rows = study.map.heads.map(() => {
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

/** Why a size that reaches the loss has no cost. */
const unsupported = (row) => (row.edge ? "at the edge" : "not served");

function showRanking(asked, result) {
  const { unit } = asked.goal;
  const { largest_regret } = study.map;
  write("ranking-cost", unit || "Z");
  result.order.forEach((h, i) => {
    const row = result.rows[h];
    const one = study.map.heads[h];
    const reached = Number.isFinite(row.n_params);
    const served = Number.isFinite(row.cost);
    const saves = served && Number.isFinite(row.saving);
    const shown = [
      one.label,
      Number.isNaN(row.probability) ? "" : percent(row.probability),
      h === result.best ? "the answer" : served ? moreText(row.more) : "",
      reached ? `${size(row.n_params)}${row.beyond === 1 ? "" : "*"}` : "none",
      reached ? sizes(row.n_params_interval) : "",
      reached ? shapeText(row) : "",
      served ? amount(row.cost, unit) : reached ? unsupported(row) : "not reached",
      served ? amounts(row.cost_interval, unit) : "",
      saves ? savingText(row.saving, largest_regret) : "",
      saves ? savingBetween(row.saving_interval, largest_regret) : "",
    ];
    shown.forEach((value, k) => {
      if (cells[i][k].textContent !== value) cells[i][k].textContent = value;
    });
    cells[i][0].style.setProperty("--swatch", one.color);
    cells[i][0].parentNode.className = h === result.best ? "best" : "";
  });
}

let rest = 0;
let used = false; // whether a control was touched

function showWords(asked, result) {
  const said = sentence(asked, result);
  write("sentence", said);
  showFacts(asked, result);
  write("served", servedText(asked, result));
  const care = warnings(asked, result);
  $("explorer-care").hidden = care.length === 0;
  if (care.join() !== $("explorer-warnings").dataset.said) {
    $("explorer-warnings").replaceChildren(...care.map((line) => Object.assign(document.createElement("li"), { textContent: line })));
    $("explorer-warnings").dataset.said = care.join();
  }
  write("command", command(asked));
  clearTimeout(rest);
  const { best, rows } = result;
  const sure = best === null || Number.isNaN(rows[best].probability) ? "" : ` Probability ${percent(rows[best].probability)}.`;
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
  const result = look(study.map, asked);
  showWords(asked, result);
  showRanking(asked, result);
  charts.show(study.map, asked, result);
  return result;
}

/** Puts the question into the address: a link to this page opens with it. */
function writeAddress() {
  const parts = Object.entries(state).filter(([, value]) => value !== null).map(([name, value]) => `${name}=${value}`);
  history.replaceState(null, "", `#ask:${parts.join("&")}`);
}

/** Takes the question that is in the address, as far as there is one; whether there was. */
function readAddress() {
  if (!location.hash.startsWith("#ask:")) return false;
  const given = new URLSearchParams(location.hash.slice(5));
  const index = Number(given.get("study") ?? state.study);
  if (studies[index] && index !== Number(state.study)) openStudy(index);
  for (const [name, text] of given) {
    const value = Number(text);
    if (name in SLIDERS) {
      if (text !== "" && value >= Number($(name).min) && value <= Number($(name).max)) state[name] = SLIDERS[name].whole ? Math.round(value) : value;
    } else if (CHOICES.includes(name) && [...$(name).options].some((one) => one.value === text)) state[name] = text;
  }
  return true;
}

openStudy(0);
readAddress();
showControls();
answer();
$("explorer-form").addEventListener("input", read);
$("reset").addEventListener("click", () => {
  state = firstQuestion(Number(state.study));
  ask();
});
$("copy").addEventListener("click", async () => {
  const text = $("command").textContent;
  try {
    await navigator.clipboard.writeText(text);
    write("copy", "Copied");
  } catch {
    getSelection().selectAllChildren($("command")); // a page on disk may not be allowed to
    write("copy", "Selected");
  }
  setTimeout(() => write("copy", "Copy"), 1500);
});
addEventListener("hashchange", () => {
  if (!readAddress()) return;
  ask();
  $("explorer").scrollIntoView();
  $("sentence").focus({ preventScroll: true });
});
addEventListener("beforeprint", () => charts.draw());
// For the browser's console, and for tests: the map by hand.
globalThis.gqa = { answer, charts, costCurves, look, moreText, query, savingBetween, savingText, studies };
