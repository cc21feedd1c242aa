// Answers read off a map that was computed beforehand (launch/report/answer_map.py): pure functions of it, without the page.
//
// A question is a goal (a cost, on a device), a context served and a loss. Points of the map are exact. Between them sizes and
// costs are interpolated in logarithms by cubics (Lagrange's, of four points each way) against ln(context) and ln(loss - below);
// probabilities and regrets as straight lines. Numbers are flat: index (context * losses + loss) * heads + h.

/** The map of a study, unpacked: every field of every goal as Float64Array, of logarithms where they are. */
export async function unpack(packed) {
  const { losses, contexts, below, heads } = packed;
  const goals = await Promise.all(Object.values(packed.goals).map((goal) => unpackGoal(goal, packed)));
  const axes = { loss: losses.map((loss) => Math.log(loss - below)), context: contexts.map(Math.log) };
  return { ...packed, goals, axes, width: heads.length };
}

async function unpackGoal(goal, { contexts, losses, heads }) {
  const packed = Uint8Array.from(atob(goal.data), (c) => c.charCodeAt(0));
  const bytes = new Uint8Array(await new Response(new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"))).arrayBuffer());
  const size = contexts.length * losses.length * heads.length;
  let at = 0;
  const plane = () => bytes.subarray(at, (at += size));
  const fields = {};
  for (const [name, how] of Object.entries(goal.fields)) fields[name] = { log: how.log, values: numbers(plane(), plane(), plane(), how, losses.length, heads.length) };
  const coded = {};
  for (const [name, words] of Object.entries(goal.coded)) coded[name] = { words, codes: plane() };
  return { ...goal, data: null, fields, coded };
}

/** Levels are sums of what changes from loss to loss; 0: there is no number, 1: it is infinite. */
function numbers(low, middle, high, how, nLosses, width) {
  const values = new Float64Array(low.length);
  const levels = new Int32Array(width);
  for (let i = 0; i < values.length; i++) {
    const h = i % width;
    if (Math.floor(i / width) % nLosses === 0) levels[h] = 0;
    levels[h] = (levels[h] + (low[i] | (middle[i] << 8) | (high[i] << 16))) & 0xffffff;
    values[i] = levels[h] > 1 ? how.low + how.step * (levels[h] - 2) : levels[h] === 1 ? Infinity : NaN;
  }
  return values;
}

/** Places and weights of interpolation at `x` among increasing `points`: one where x is a point, else two, and up to four. */
export function weights(points, x) {
  const last = points.length - 1;
  const at = Math.min(Math.max(x, points[0]), points[last]);
  let i = 0;
  while (i < last - 1 && points[i + 1] <= at) i++;
  for (const k of [i, i + 1]) {
    if (Math.abs(at - points[k]) < 1e-9) return { line: [[k, 1]], cubic: [[k, 1]] };
  }
  const share = (at - points[i]) / (points[i + 1] - points[i]);
  const line = [[i, 1 - share], [i + 1, share]];
  const first = Math.max(0, Math.min(i - 1, last - 3));
  const four = [first, first + 1, first + 2, first + 3].filter((k) => k <= last);
  const cubic = four.map((k) => [k, four.reduce((product, j) => (j === k ? product : (product * (at - points[j])) / (points[k] - points[j])), 1)]);
  return { line, cubic };
}

/** Where a question lies in a map. */
export function place(map, context, loss) {
  const place = { context: weights(map.axes.context, Math.log(context)), loss: weights(map.axes.loss, Math.log(loss - map.below)) };
  return { ...place, corners: corners(map, place, "line"), all: corners(map, place, "cubic") };
}

function corners(map, place, kind) {
  return place.context[kind].flatMap(([c, x]) => place.loss[kind].map(([l, y]) => [(c * map.losses.length + l) * map.width, x * y]));
}

/** A field of the h-th heads there; NaN where the map has none of it, or has it on one side only. */
function value(field, h, { corners, all }) {
  if (!field) return NaN;
  const weighted = (points) => points.reduce((sum, [i, weight]) => sum + weight * field.values[i + h], 0);
  const ends = corners.map(([i]) => field.values[i + h]);
  if (ends.every((end) => end === Infinity)) return Infinity;
  if (!ends.every(Number.isFinite)) return NaN;
  if (!field.log) return weighted(corners);
  const curved = weighted(all);
  return Math.exp(Number.isFinite(curved) ? curved : weighted(corners));
}

/** A field of words there: of the nearest point; empty for none. */
function word(field, h, { corners }) {
  const nearest = corners.reduce((one, other) => (other[1] > one[1] ? other : one));
  return field.words[field.codes[nearest[0] + h] - 1] ?? "";
}

/**
 * What the map says to a question: {context, loss, goal (of map.goals)}.
 *
 * Gives {best, runner_up (places in map.heads; null for none), order (the answer first), rows, exact (whether it is a point)}. A row
 * per head configuration: n_params, n_layers, d_model, ratio, cost, saving and their intervals; probability, expected_regret; more,
 * what it costs more than the answer on average; beyond, N* over the nearest trained size (1 inside); far, whether that is a guess;
 * edge, whether it can be served so on one side and not on the other; steps, whether its cost moves in steps here; and served.
 */
export function look(map, { context, loss, goal }) {
  const here = place(map, context, loss);
  const rows = map.heads.map((one, h) => row(map, goal, one, h, here));
  const known = (h) => Number.isFinite(rows[h].cost);
  const worth = (h) => (Number.isFinite(rows[h].expected_regret) ? rows[h].expected_regret : rows[h].cost);
  const order = rows.map((_, h) => h).sort((g, h) => known(h) - known(g) || compare(worth(g), worth(h)) || compare(rows[g].cost, rows[h].cost));
  const [best = null, second = null] = order.filter(known);
  if (best !== null && rows[best].far) for (const one of rows) one.probability = NaN;
  for (const one of rows) one.more = best === null ? NaN : more(one, rows[best], map.largest_regret);
  return { best, runner_up: second, order, rows, exact: here.corners.length === 1 };
}

/** What one costs more than another on average, both against the cheapest of every draw; by the costs themselves without draws. */
function more(one, other, largest) {
  if (one.expected_regret >= largest) return Infinity;
  return Number.isFinite(one.expected_regret) ? one.expected_regret - other.expected_regret : one.cost / other.cost - 1;
}

function row(map, goal, one, h, here) {
  const { fields, coded } = goal;
  const read = (name) => value(fields[name], h, here);
  const between = (name) => [read(`${name}_low`), read(`${name}_high`)];
  const [n, layers, ratio] = [read("n_params"), read("n_layers"), read("ratio")];
  const [low, high] = one.trained ?? [NaN, NaN];
  const beyond = n > high ? n / high : n < low ? low / n : 1;
  const ends = here.corners.map(([i]) => Number.isFinite(fields.cost.values[i + h]));
  const batches = here.corners.map(([i]) => fields.batch?.values[i + h]);
  return {
    n_params: n,
    n_params_interval: between("n_params"),
    n_layers: layers,
    d_model: layers * ratio,
    ratio,
    cost: read("cost"),
    cost_interval: between("cost"),
    probability: read("probability"),
    expected_regret: read("expected_regret"),
    saving: 1 - read("kept"),
    saving_interval: [1 - read("kept_high"), 1 - read("kept_low")],
    beyond,
    far: beyond > map.far,
    edge: ends.includes(true) && ends.includes(false),
    steps: coded.steps !== undefined && here.corners.some(([i]) => coded.steps.codes[i + h]) && new Set(batches).size > 1,
    served: goal.served && {
      layout: word(coded.layout, h, here),
      prefill_limit: word(coded.prefill_limit, h, here),
      decode_limit: word(coded.decode_limit, h, here),
      ...Object.fromEntries(["batch", "ttft", "tpot", "usd_per_million_input", "usd_per_million_output"].map((name) => [name, read(name)])),
    },
  };
}

/** Cost of reaching each of `losses` at a context, of every head configuration; not finite where there is none. */
export function costCurves(map, { context, goal }, losses) {
  const places = losses.map((loss) => place(map, context, loss));
  return map.heads.map((_, h) => places.map((here) => value(goal.fields.cost, h, here)));
}

const compare = (x, y) => (x < y ? -1 : x > y ? 1 : 0);
