// The search of gqa_jax.search.optimum in the reader's browser: pure functions of the payload, in float64, without the page.
//
// 1. N* = exp(log_a - ln(L* - E) / b), infinite when L* <= E                       (arXiv 2503.09579v2, Eq. 8)
//    in a draw with a bend q: b (log_a - ln N*) - q(ln N*) = ln(L* - E)             (gqa_jax.laws.bends)
// 2. aspect ratio r = d / L: linear between knots (N_i, r_i), constant outside      (Appendix B.1)
// 3. layers L: the one positive root of N(L) = N* with d = r L, d_ff = 8 d / 3, a cubic
// 4. cost of that shape at the served context                                       (Eq. 3 to 5, or roofline.js)
//
// Draws are the joint uncertainty of all coefficients. Matrices are flat and draw after draw: index s * H + h.

import { cacheValues, embeddingParams, forwardFlops, innerParams } from "./costs.js";
import { bestLoad, fits, layoutsOf, served, usdPerMillion } from "./roofline.js";

/** The payload with its numbers unpacked: draws as Float64Array of S x H (none: of 0 x H; bends: of S), NaN for what is null. */
export function unpack(payload) {
  const width = payload.heads.length;
  const draws = { count: payload.draws?.count ?? 0 };
  const point = {};
  for (const name of ["entropy", "log_a", "b"]) {
    draws[name] = float64(payload.draws?.[name] ?? "");
    if (name === "entropy" && draws[name].length === draws.count) {
      const shared = draws[name]; // by all heads
      draws[name] = Float64Array.from({ length: draws.count * width }, (_, i) => shared[Math.floor(i / width)]);
    }
    if (draws[name].length !== draws.count * width) {
      throw new Error(`draws of ${name}: ${draws[name].length} numbers instead of ${draws.count} x ${width}`);
    }
    point[name] = payload.point[name].map((value) => value ?? NaN);
  }
  draws.bends = unpackBends(payload.draws?.bends ?? null);
  return { ...payload, draws, point, middles: new Map(), trained: payload.trained.map((sizes) => sizes.map((value) => value ?? NaN)) };
}

function unpackBends(packed) {
  if (packed === null) return null;
  const columns = Object.fromEntries(["kind", "amount", "place"].map((name) => [name, float64(packed[name])]));
  const [none, drift] = ["none", "drift"].map((name) => packed.kinds.indexOf(name));
  return { ...columns, none, drift, logCenter: Math.log(packed.center), reach: packed.reach };
}

function float64(base64) {
  const text = atob(base64);
  const bytes = Uint8Array.from(text, (c) => c.charCodeAt(0));
  const view = new DataView(bytes.buffer);
  return Float64Array.from({ length: bytes.length / 8 }, (_, i) => view.getFloat64(8 * i, true));
}

/** N* that reaches `loss`; infinite where E is not below it, NaN where there is no law. */
export function solveParams(loss, entropy, logA, b) {
  return loss <= entropy ? Infinity : Math.exp(logA - Math.log(loss - entropy) / b);
}

const STEPS = 60; // of Newton's method, which needs 5 or so

/** ln N at which a law with the bend of draw s reaches what its power law, of exponent b, reaches at ln N = `goal`. */
function bent(bends, s, goal, b) {
  const kind = bends.kind[s];
  if (kind === bends.none || !Number.isFinite(goal)) return goal;
  const { reach, logCenter } = bends;
  const amount = bends.amount[s];
  let found = goal;
  for (let i = 0; i < STEPS; i++) {
    const x = found - logCenter;
    let [q, slope] = [0, 0];
    if (kind === bends.drift) {
      const inside = Math.min(Math.max(x, -reach), reach);
      q = amount * (x * x - (x - inside) * (x - inside));
      slope = 2 * amount * inside;
    } else {
      const y = 2 * (x - bends.place[s]);
      q = (amount * (Math.max(y, 0) + Math.log1p(Math.exp(-Math.abs(y))))) / 2;
      slope = amount / (1 + Math.exp(-y));
    }
    const step = (b * (goal - found) - q) / (b + slope);
    found += step;
    if (Math.abs(step) < 1e-12 * (1 + Math.abs(found))) break;
  }
  return found;
}

/** N* of the h-th heads in draw s; `logGap` is ln(loss - E), NaN where E is not below the loss. */
function drawnParams(model, s, h, logGap) {
  const { log_a: logA, b, bends } = model.draws;
  const i = s * model.heads.length + h;
  if (!(logGap < Infinity)) return Infinity;
  const logN = logA[i] - logGap / b[i];
  return Math.exp(bends === null ? logN : bent(bends, s, logN, b[i]));
}

/** Aspect ratio d / L at N parameters. */
export function aspectRatio(aspect, params) {
  const { params: knots, ratio } = aspect;
  const last = knots.length - 1;
  if (params <= knots[0]) return ratio[0];
  if (params >= knots[last]) return ratio[last];
  let low = 0;
  let high = last;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (knots[middle] <= params) low = middle;
    else high = middle;
  }
  return ratio[low] + ((ratio[high] - ratio[low]) / (knots[high] - knots[low])) * (params - knots[low]);
}

/** Query heads of a width: the configuration's own, or d / d_h (Llama-3's rule). */
export function queryHeads(heads, dModel, headDim) {
  return heads.n_heads ?? dModel / headDim;
}

/** Key/value heads of a width: a number, or below 0 a group of query heads for each. */
export function kvHeads(heads, dModel, headDim) {
  return heads.n_kv_heads < 0 ? queryHeads(heads, dModel, headDim) / -heads.n_kv_heads : heads.n_kv_heads;
}

/** Layers of the shape of N parameters without embeddings: Newton from above on a convex cubic, so monotone. */
export function solveLayers(params, ratio, heads, convention, headDim) {
  if (!(params < Infinity)) return params;
  const ofWidth = heads.n_heads === null;
  const share = heads.n_kv_heads < 0 ? 1 / -heads.n_kv_heads : 0; // n_kv / n_h of rules that fix it
  const cubic = ((convention.ffn_matrices * 8) / 3 + (ofWidth ? 2 * (1 + share) : 0)) * ratio * ratio;
  const square = 2 * ratio * headDim * ((ofWidth ? 0 : heads.n_heads) + Math.max(heads.n_kv_heads, 0)) + (convention.norms ? 2 * ratio : 0);
  const linear = convention.norms ? ratio : 0;
  let layers = Math.min(Math.cbrt(params / cubic), Math.sqrt(params / square));
  for (let i = 0; i < 100; i++) {
    const value = ((cubic * layers + square) * layers + linear) * layers - params;
    const next = layers - value / ((3 * cubic * layers + 2 * square) * layers + linear);
    if (!(next < layers)) return layers;
    layers = next;
  }
  return layers;
}

const SEQUENCE_FACTOR = { per_token: () => 1, half_T: (context) => context / 2, full_T: (context) => context };

/** M_infer: values (bytes of 1 each), or bytes. */
function inferMemory(shape, model, objective, context) {
  const { convention, param_bytes: param, cache_bytes: cache } = objective;
  const params = innerParams(shape, model, convention) + embeddingParams(shape, model, convention);
  return param * params + cache * cacheValues(shape, model, context);
}

/** C_infer: of a token, or of a sequence, as the convention says. */
function inferFlops(shape, model, objective, context) {
  return forwardFlops(shape, model, objective.convention, context) * SEQUENCE_FACTOR[objective.convention.flops](context);
}

function trainFlops(shape, model, training, context) {
  const { convention } = training;
  const tokens = training.tokens ?? training.tokens_per_param * innerParams(shape, model, convention);
  return 3 * tokens * forwardFlops(shape, model, convention, (training.train_context ?? context) / 2);
}

function lifetime(shape, model, objective, context, layouts) {
  const { serving, training, served_tokens: tokens } = objective;
  const trained = trainFlops(shape, model, training, context);
  if (serving === null) return trained + tokens * forwardFlops(shape, model, training.convention, context / 2);
  const usd = ((trained / (objective.training_mfu * serving.bfloat16_flops)) * serving.usd_per_hour) / 3600;
  return tokens === 0 ? usd : usd + (tokens / 1e6) * price(shape, model, objective, context, layouts);
}

const throughput = (shape, model, { serving }, context, layouts) => bestLoad(shape, model, serving, context, "price", layouts).cost;
const price = (shape, model, objective, context, layouts) => usdPerMillion(objective.serving, throughput(shape, model, objective, context, layouts));

const power = (x, exponent) => (exponent === 1 / 2 ? Math.sqrt(x) : exponent === 1 / 3 ? Math.cbrt(x) : x ** exponent);

/**
 * What is minimised, by name (gqa_jax.search.objectives): (shape, model, objective, context, layouts) -> cost; `objective` is
 * `describe()`, `layouts` are those that may be chosen where there is a `serving`.
 */
const COSTS = {
  z: (shape, model, objective, context) => {
    const { lam, alpha, beta } = objective;
    const memory = lam === 0 ? 0 : lam * power(inferMemory(shape, model, objective, context), alpha);
    return memory + (lam === 1 ? 0 : (1 - lam) * power(inferFlops(shape, model, objective, context), beta));
  },
  memory: inferMemory,
  flops: inferFlops,
  latency: (shape, model, { serving }, context, layouts) => bestLoad(shape, model, serving, context, "latency", layouts).cost,
  throughput,
  price,
  train: trainFlops,
  lifetime,
};
const chosenBy = (objective) => (objective.cost === "latency" ? "latency" : "price");

/**
 * (N, h) -> cost of the h-th heads of that size, for a question; infinite where they don't keep its limit, NaN for NaN.
 *
 * `layouts`, one list for each of the heads, are those that may be chosen; default: `settled`.
 */
function costOf(model, query, layouts = settled(model, query)) {
  const { context, objective, memory_limit: limit } = query;
  const cost = COSTS[objective.cost];
  if (cost === undefined) throw new Error(`cost ${objective.cost} is unknown here: ${Object.keys(COSTS).join(", ")}`);
  return (params, h) => {
    if (!(params < Infinity)) return params;
    const shape = shapeOf(model, params, h);
    if (limit !== null && !fits(shape, model, limit, context)) return Infinity;
    return cost(shape, model, objective, context, layouts?.[h]);
  };
}

/**
 * The layout of each of the heads that is the best by the fitted laws, in a list: it holds for all draws. Where heads have no law
 * of their own, by the middle of the draws. Null without a device.
 */
function settled(model, { context, loss, objective }) {
  const serving = objective.serving ?? null;
  if (serving === null) return null;
  const open = layoutsOf(serving);
  return model.heads.map((_, h) => {
    let params = pointParams(model, loss, h);
    if (Number.isNaN(params) && model.draws.count > 0) {
      const logGap = (s) => Math.log(loss - model.draws.entropy[s * model.heads.length + h]);
      params = quantile(Float64Array.from({ length: model.draws.count }, (_, s) => drawnParams(model, s, h, logGap(s))), 0.5);
    }
    if (open.length === 1 || !(params < Infinity)) return open.slice(0, 1);
    return [bestLoad(shapeOf(model, params, h), model, serving, context, chosenBy(objective), open).layout];
  });
}

/** Shape of N parameters for the h-th heads. */
function shapeOf(model, params, h) {
  const heads = model.heads[h];
  const ratio = aspectRatio(model.aspect, params);
  const layers = solveLayers(params, ratio, heads, model.shape_convention, model.head_dim);
  const d = ratio * layers;
  return { layers, d, nHeads: queryHeads(heads, d, model.head_dim), nKv: kvHeads(heads, d, model.head_dim) };
}

/** The k-th smallest of values[from ..], which are put in such order that those before it are not above it (Hoare). */
function select(values, k, from = 0) {
  let low = from;
  let high = values.length - 1;
  while (low < high) {
    const pivot = values[(low + high) >> 1];
    let i = low;
    let j = high;
    while (i <= j) {
      while (values[i] < pivot) i++;
      while (values[j] > pivot) j--;
      if (i <= j) {
        const value = values[i];
        values[i++] = values[j];
        values[j--] = value;
      }
    }
    if (k <= j) high = j;
    else if (k >= i) low = i;
    else break;
  }
  return values[k];
}

/** Quantile, linear between neighbours; infinite where the upper one is; NaN of no values. Puts them in another order. */
function quantile(values, share, from = 0) {
  if (values.length === 0) return NaN;
  const at = share * (values.length - 1);
  const low = select(values, Math.floor(at), from);
  const high = select(values, Math.ceil(at), Math.floor(at));
  return low === high ? low : low + (high - low) * (at - Math.floor(at));
}

const LEVEL = 0.95;

/** 95% of the values. */
function interval(values) {
  const copy = values.slice();
  const tail = (1 - LEVEL) / 2;
  const low = quantile(copy, tail);
  return [low, quantile(copy, (1 + LEVEL) / 2, Math.floor(tail * (copy.length - 1)))];
}

/**
 * Which heads reach `query.loss` at the least cost when served at `query.context`, and how sure that is: gqa_jax.search.optimum.search.
 *
 * `query` is {context, loss, objective and memory_limit (as `describe` gives an objective and a `Serving`; or null)}. Gives {best, runner_up (indices
 * into model.heads; null where none reaches the loss), order (candidates, the answer first), not_reached (share of draws), rows,
 * baseline (cost and cost_interval of Llama-3's heads, or null)}.
 * A row per candidate, in the order of model.heads: n_params, n_params_interval, n_layers, d_model, cost, cost_interval,
 * probability, expected_regret, regret_interval, saving, saving_interval, beyond (N* over the nearest trained size; 1 inside),
 * served (`served` of roofline.js; null without a device, or where the loss is not reached).
 * The last of model.heads may be Llama-3's: no candidate then, only compared with. Without draws what they say is NaN.
 */
export function search(model, query) {
  const width = model.heads.length;
  const { n_candidates: candidates, baseline, largest_regret: largest } = model;
  const { count, entropy } = model.draws;
  const layouts = settled(model, query);
  const cost = costOf(model, query, layouts);

  const params = model.heads.map(() => new Float64Array(count));
  const costs = model.heads.map(() => new Float64Array(count));
  const least = new Float64Array(count).fill(Infinity);
  const wins = new Array(candidates).fill(0);
  let reached = 0;
  let last = NaN;
  let logGap = NaN; // the same for all heads of a draw, where they share E
  for (let s = 0; s < count; s++) {
    let winner = -1;
    for (let h = 0; h < width; h++) {
      const i = s * width + h;
      if (entropy[i] !== last) {
        last = entropy[i];
        logGap = Math.log(query.loss - last);
      }
      params[h][s] = drawnParams(model, s, h, logGap);
      costs[h][s] = cost(params[h][s], h);
      if (h < candidates && costs[h][s] < least[s]) {
        least[s] = costs[h][s];
        winner = h;
      }
    }
    if (winner >= 0) {
      wins[winner]++;
      reached++;
    }
  }

  const baseCost = baseline === null ? NaN : cost(pointParams(model, query.loss, baseline), baseline);
  let tooLarge = baseCost === Infinity && Number.isFinite(pointParams(model, query.loss, baseline)); // for the limit, or a server
  if (Number.isNaN(baseCost) && baseline !== null && Number.isNaN(pointParams(model, query.loss, baseline))) {
    const ofSize = costs[baseline].filter((_, s) => Number.isFinite(params[baseline][s]));
    tooLarge = ofSize.filter((one) => Number.isFinite(one)).length < 0.5 * ofSize.length; // no law of its own: in most draws
  }
  const baseCosts = baseline === null || tooLarge ? null : costs[baseline];
  const rows = [];
  for (let h = 0; h < candidates; h++) {
    const n = pointParams(model, query.loss, h);
    const shape = n < Infinity ? shapeOf(model, n, h) : { layers: n, d: n };
    const own = cost(n, h);
    const regrets = new Float64Array(reached);
    const saved = new Float64Array(baseCosts === null ? 0 : count);
    let known = 0; // of what is saved: where neither heads reach the loss it is nothing
    let sum = 0;
    for (let s = 0, k = 0; s < count; s++) {
      if (least[s] < Infinity) {
        regrets[k] = Math.min(costs[h][s] / least[s] - 1, largest);
        sum += regrets[k++];
      }
      if (baseCosts !== null && (costs[h][s] < Infinity || baseCosts[s] < Infinity)) saved[known++] = 1 - costs[h][s] / baseCosts[s];
    }
    const savings = saved.subarray(0, known);
    const [low, high] = model.trained[h];
    rows.push({
      n_params: n,
      n_params_interval: interval(params[h]),
      n_layers: shape.layers,
      d_model: shape.d,
      cost: own,
      cost_interval: interval(costs[h]),
      probability: wins[h] / reached,
      expected_regret: sum / reached,
      regret_interval: interval(regrets),
      saving: tooLarge ? NaN : Number.isNaN(baseCost) ? quantile(savings, 0.5) : 1 - own / baseCost,
      saving_interval: interval(savings),
      beyond: n > high ? n / high : n < low ? n / low : 1,
      served: layouts && n < Infinity ? served(shape, model, query.objective.serving, query.context, chosenBy(query.objective), layouts[h][0]) : null,
    });
  }

  const worth = (h) => (count > 0 && reached > 0 ? rows[h].expected_regret : rows[h].cost);
  const order = rows.map((_, h) => h).sort((g, h) => compare(!possible(rows[g]), !possible(rows[h])) || compare(worth(g), worth(h)) || compare(rows[g].cost, rows[h].cost));
  const [best = null, second = null] = order.filter((h) => possible(rows[h]));
  const base = baseCosts === null ? null : { cost: Number.isNaN(baseCost) ? quantile(baseCosts.slice(), 0.5) : baseCost, cost_interval: interval(baseCosts) };
  return { best, runner_up: second, order, rows, baseline: base, not_reached: 1 - reached / count };
}

const possible = (row) => Number.isFinite(row.cost);

function compare(x, y) {
  return x < y ? -1 : x > y ? 1 : 0;
}

function pointParams(model, loss, h) {
  const { entropy, log_a: logA, b } = model.point;
  return solveParams(loss, entropy[h], logA[h], b[h]);
}

const LOSSES_OF_A_MIDDLE = 48;

/**
 * loss -> the middle of the draws' N* of the h-th heads, within the losses that can be asked for.
 *
 * Computed once, at some losses; between them ln N is linear in ln(loss - E), E the middle: exact where laws are power laws.
 */
function middleParams(model, h) {
  if (!model.middles.has(h)) model.middles.set(h, interpolatedMiddle(model, h));
  return model.middles.get(h);
}

function interpolatedMiddle(model, h) {
  const { count, entropy } = model.draws;
  const ownE = Float64Array.from({ length: count }, (_, s) => entropy[s * model.heads.length + h]);
  const [low, high] = model.ranges.loss;
  const middleE = Math.min(quantile(ownE.slice(), 0.5), low - 1e-3);
  const [first, last] = [low, high].map((loss) => Math.log(loss - middleE));
  const step = (last - first) / (LOSSES_OF_A_MIDDLE - 1);
  const logSizes = Array.from({ length: LOSSES_OF_A_MIDDLE }, (_, i) => {
    const loss = middleE + Math.exp(first + i * step);
    return Math.log(quantile(ownE.map((e, s) => drawnParams(model, s, h, Math.log(loss - e))), 0.5));
  });
  return (loss) => {
    const at = Math.min(Math.max((Math.log(loss - middleE) - first) / step, 0), LOSSES_OF_A_MIDDLE - 1);
    const i = Math.min(Math.floor(at), LOSSES_OF_A_MIDDLE - 2);
    return Math.exp((i + 1 - at) * logSizes[i] + (at - i) * logSizes[i + 1]);
  };
}

/**
 * Cost of reaching each of `losses` with the h-th heads; infinite where it is not reached.
 *
 * By the fitted coefficients; of heads without a law of their own (Llama-3's, by the head law) by the middle of the draws.
 * Each size in the layout that is the best for it.
 */
export function costCurve(model, query, losses, h) {
  const known = !Number.isNaN(model.point.b[h]);
  const serving = query.objective.serving ?? null;
  const cost = serving && known ? costOf(model, query, model.heads.map(() => layoutsOf(serving))) : costOf(model, query);
  const params = known ? (loss) => pointParams(model, loss, h) : middleParams(model, h);
  return losses.map((loss) => cost(params(loss), h));
}
