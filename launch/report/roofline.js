// What serving a model costs: gqa_jax.search.roofline, whose docstring has the formulas and their symbols.
//
// `serving` is `Serving.describe()`, a shape {layers, d, nHeads, nKv}, a layout [t, p, c]: devices over which heads, sequences
// and context are divided.

import { embeddingParams, ffnParams, normParams } from "./costs.js";

const [ACTIVATION, SUM] = [2, 4]; // bytes of a value and of a log-sum-exp that are exchanged
const ALIKE = 1e-9; // relative: the first of layouts that cost as much but for rounding is taken
const PARTS = ["matmul", "attention", "weights", "cache", "exchange", "layers"];
const OBSTACLES = ["heads", "batch", "memory", "ttft", "tpot"]; // why a model can't be served as asked; the last comes furthest

const lacking = (over) => (over - 1) / over; // share that one device has not

/** Layouts that may be chosen, tensor parallelism first. */
export function layoutsOf({ n_devices: n, parallelism }) {
  if (parallelism === "tensor") return [[n, 1, 1]];
  if (parallelism !== "best") return [parallelism];
  const found = [];
  for (let t = n; t >= 1; t--) for (let p = n; p >= 1; p--) if (n % (t * p) === 0) found.push([t, p, n / (t * p)]);
  return found;
}

/** Whether heads can be divided so: evenly; where they are no whole number, over as many devices at most. */
const divides = ({ nHeads }, [t]) => (nHeads % 1 === 0 ? nHeads % t === 0 : !(nHeads < t));

const gcd = (a, b) => (b === 0 ? a : gcd(b, a % b));

/** Key/value heads that one of t devices needs. */
function kvHeadsHeld({ nHeads, nKv }, t) {
  const [group, own] = [nHeads / nKv, nHeads / t];
  const whole = group % 1 === 0 && own % 1 === 0 && group >= 1 && own >= 1;
  return whole ? Math.ceil((own - gcd(group, own)) / group) + 1 : Math.max(nKv / t, 1);
}

/**
 * Parameters by how they are divided, and bytes of a device: `held` with so many times the vocabulary, its attention divided over
 * a group; `cached` of x tokens.
 */
function partsOf(shape, model, serving, [t, , c]) {
  const { convention, n_devices: n, param_bytes: bytes } = serving;
  const kv = kvHeadsHeld(shape, t);
  const each = 2 * shape.layers * shape.d * model.head_dim;
  const [ffn, vocabulary, norms] = [ffnParams(shape, convention), embeddingParams(shape, model, convention), normParams(shape, convention)];
  const [queries, keys] = [each * shape.nHeads, each * kv];
  const value = model.cache_bytes[serving.cache_dtype];
  const held = (times, group = t * c) => bytes * ((ffn + times * vocabulary) / n + queries / group + keys + norms);
  const cached = (x) => (2 * shape.layers * model.head_dim * kv * value * x) / c;
  return { kv, ffn, vocabulary, queries, keys, held, cached };
}

/** Bytes on the fullest device. */
function memoryBytes(parts, serving, [, p], context, batch) {
  return parts.held(serving.untied ? 2 : 1) + Math.ceil(batch / p) * parts.cached(context);
}

/** Share of the peak that attention kernels reach at a head size. */
function attentionShare({ attention_share: known, efficiency }, headDim) {
  if (efficiency.bound || known.length === 0) return 1;
  const [size, forward] = known.find(([size]) => headDim <= size) ?? known.at(-1);
  return forward * Math.min(1, headDim / size);
}

/** Seconds of FLOPs, bytes, bytes exchanged and collectives; of each of PARTS, and of the phase. */
function phase(shape, model, serving, { matmul, attention, weights, cache, exchanged, waited }) {
  const { efficiency: reached, memory_bandwidth: bandwidth } = serving;
  const found = {
    matmul: matmul / (reached.matmul * serving.peak_flops),
    attention: attention / (reached.attention * attentionShare(serving, model.head_dim) * serving.attention_flops),
    weights: weights / (reached.weights_bandwidth * bandwidth),
    cache: cache / (reached.cache_bandwidth * bandwidth),
    exchange: serving.n_devices === 1 ? 0 : (exchanged / serving.interconnect + waited) / reached.exchange,
    layers: shape.layers * reached.layer_seconds,
  };
  found.seconds = reached.bound
    ? Math.max(found.matmul + found.attention, found.weights + found.cache, found.exchange)
    : found.matmul + found.weights + found.attention + found.cache + found.exchange + found.layers;
  return found;
}

const limitOf = (phase) => PARTS.reduce((most, name) => (phase[name] > phase[most] ? name : most));

const collective = ({ collective_seconds: known }, over) => known.find(([count]) => count === over)?.[1] ?? 0;

function prefill(shape, model, serving, layout, parts, tokens) {
  const [t, p, c] = layout;
  const { n_devices: n } = serving;
  const s = (over) => collective(serving, over);
  const gathered = 2 * ACTIVATION * model.head_dim * parts.kv * tokens + (serving.param_bytes * 2 * shape.d * model.head_dim * shape.nHeads) / t;
  return phase(shape, model, serving, {
    matmul: 2 * tokens * ((p * parts.ffn) / n + parts.queries / (t * c) + parts.keys / c),
    attention: (((4 * shape.layers * model.head_dim * shape.nHeads) / t) * tokens * (tokens / 2)) / c,
    weights: parts.held(0, t),
    cache: parts.cached(tokens),
    exchanged: shape.layers * (2 * ACTIVATION * shape.d * (lacking(n) * p * tokens + (lacking(t) * tokens) / c) + lacking(c) * gathered),
    waited: shape.layers * (s(t) + s(n) + s(c)),
  });
}

function decodeStep(shape, model, serving, layout, parts, keys, batch) {
  const [t, p, c] = layout;
  const { n_devices: n } = serving;
  const own = Math.ceil(batch / p);
  const s = (over) => collective(serving, over);
  return phase(shape, model, serving, {
    matmul: 2 * ((batch * (parts.ffn + parts.vocabulary)) / n + own * (parts.queries / (t * c) + parts.keys)),
    attention: (((4 * own * shape.layers * model.head_dim * shape.nHeads) / t) * keys) / c,
    weights: parts.held(1),
    cache: own * parts.cached(keys),
    exchanged:
      shape.layers *
      (2 * ACTIVATION * shape.d * (lacking(n) * batch + lacking(t * c) * own) + ((lacking(c) * own * shape.nHeads) / t) * (2 * ACTIVATION * model.head_dim + SUM)),
    waited: shape.layers * (s(t * c) + s(n) + s(c)) + s(n),
  });
}

/** The steady state in one layout. `by`, "latency" or "price", is what a batch that is left open is the best for. */
function load(shape, model, serving, context, layout, by) {
  const { n_devices: n, decode_share: share, disaggregated, ttft, tpot } = serving;
  const [prompt, generated, keys, p] = [(1 - share) * context, share * context, (1 - share / 2) * context, layout[1]];
  const parts = partsOf(shape, model, serving, layout);
  const reading = share < 1 ? prefill(shape, model, serving, layout, parts, prompt) : null;
  const first = reading?.seconds ?? 0;
  const step = (batch) => decodeStep(shape, model, serving, layout, parts, keys, batch);
  const between = (rounds) => (disaggregated || share === 0 ? 0 : ((rounds - 1) * first) / generated);
  const memory = (batch) => memoryBytes(parts, serving, layout, context, batch);

  let { batch } = serving;
  if (typeof batch !== "number") {
    const room = Math.max(0, Math.floor((serving.memory_bytes - memory(0)) / (memory(p) - memory(0)))) * p;
    const most = Math.max(room, p);
    if (batch === "best" && by === "latency") batch = p;
    else if (batch === "best" && tpot !== null) batch = p * mostWithin(most / p, (own) => step(own * p).seconds + between(own) <= tpot);
    else batch = most;
  }
  const decode = step(batch);
  const rounds = batch / p; // of prefills, while each request generates its tokens
  const stepSeconds = share > 0 ? decode.seconds : 0;
  const perToken = stepSeconds + between(rounds);
  const held = memory(batch);
  const obstacle = [
    !divides(shape, layout),
    p > batch,
    !(held <= serving.memory_bytes),
    ttft !== null && first > ttft,
    tpot !== null && perToken > tpot,
  ].indexOf(true);
  return {
    layout,
    batch,
    memory_bytes: held,
    ttft: share < 1 ? first : NaN,
    tpot: share > 0 ? perToken : NaN,
    request_seconds: first + generated * perToken,
    input_seconds: share < 1 ? (n * rounds * first) / (batch * prompt) : NaN,
    output_seconds: share > 0 ? (n * stepSeconds) / batch : NaN,
    token_seconds: (n * (rounds * first + generated * stepSeconds)) / (batch * context),
    phases: [reading, decode],
    obstacle,
  };
}

/** The most of 1 to `high` that are allowed, at least 1; more are allowed no sooner. */
function mostWithin(high, allowed) {
  if (allowed(high)) return high;
  let low = 1;
  while (low < high) {
    const middle = Math.floor((low + high + 1) / 2);
    if (allowed(middle)) low = middle;
    else high = Math.max(low, middle - 1);
  }
  return low;
}

/**
 * The load of the layout that costs the least, with `cost`: seconds of a request or device-seconds of a token; infinite where it
 * can't be. Where none can, of those that come furthest the one that misses least.
 */
export function bestLoad(shape, model, serving, context, by, layouts) {
  const loads = layouts.map((layout) => {
    const one = load(shape, model, serving, context, layout, by);
    one.cost = one.obstacle >= 0 ? Infinity : by === "latency" ? one.request_seconds : one.token_seconds;
    return one;
  });
  if (loads.some((one) => one.obstacle < 0)) return leastOf(loads, (one) => one.cost);
  const furthest = Math.max(...loads.map((one) => one.obstacle));
  const missed = ({ obstacle, memory_bytes: bytes, ttft, tpot }) => [0, 0, bytes, ttft, tpot][obstacle];
  return leastOf(loads.filter((one) => one.obstacle === furthest), missed);
}

/** The first of those whose value is the least but for rounding. */
function leastOf(loads, value) {
  const least = Math.min(...loads.map(value));
  return loads.find((one) => value(one) <= least * (1 + ALIKE));
}

/** How a model is served in `layout`, for people; or, in `obstacle`, why it can't be. */
export function served(shape, model, serving, context, by, layout) {
  const one = bestLoad(shape, model, serving, context, by, [layout]);
  if (one.cost === Infinity) return { obstacle: OBSTACLES[one.obstacle] };
  const usd = (seconds) => (serving.usd_per_hour === null ? NaN : usdPerMillion(serving, seconds));
  const [reading, decode] = one.phases;
  return {
    obstacle: null,
    layout: one.layout,
    batch: one.batch,
    memory_bytes: one.memory_bytes,
    ttft: one.ttft,
    tpot: one.tpot,
    request_seconds: one.request_seconds,
    usd_per_million_input: usd(one.input_seconds),
    usd_per_million_output: usd(one.output_seconds),
    prefill_limit: reading && limitOf(reading),
    decode_limit: limitOf(decode),
  };
}

export const usdPerMillion = (serving, deviceSeconds) => ((1e6 * serving.usd_per_hour) / 3600) * deviceSeconds;

/** Whether some layout keeps the limit of memory; with one request for each group of sequences where their number is open. */
export function fits(shape, model, serving, context) {
  return layoutsOf(serving).some((layout) => {
    const batch = typeof serving.batch === "number" ? serving.batch : layout[1];
    if (!divides(shape, layout) || layout[1] > batch) return false;
    return memoryBytes(partsOf(shape, model, serving, layout), serving, layout, context, batch) <= serving.memory_bytes;
  });
}
