// The charts of the explorer, as SVG: loss against cost, and the cost of every head configuration with its interval.
//
// Colours are those of the page's pictures, a colour and a dash for each head configuration; style.css turns both for the dark.

import { costCurves } from "./explorer.js";
import { amount, amounts, decimals, moreText, percent, range, UNITS } from "./numbers.js";

const POINTS_OF_A_CURVE = 64;
const [ROW, LABEL, MORE] = [23, 76, 118]; // pixels of a head configuration: high, of its name, and of what is said of it
const HORIZON = 6; // costs beyond so many times the least are at the edge of their chart

export class Charts {
  constructor() {
    this.places = { curves: document.getElementById("chart-curves"), costs: document.getElementById("chart-costs") };
    this.latest = null; // what `show` was last given
    let frame = 0;
    const again = () => {
      cancelAnimationFrame(frame);
      frame = requestAnimationFrame(() => this.draw());
    };
    const observer = new ResizeObserver(again);
    for (const place of Object.values(this.places)) observer.observe(place);
  }

  /** Shows what `look` has found. */
  show(map, asked, result) {
    this.latest = { map, asked, result };
    this.draw();
  }

  draw() {
    if (this.latest === null) return;
    for (const [name, place] of Object.entries(this.places)) {
      const width = Math.max(280, place.clientWidth);
      place.innerHTML = (name === "curves" ? curves : costs)(this.latest, width);
    }
  }
}

const escape = (text) => String(text).replace(/[&<>"]/g, (c) => `&#${c.charCodeAt(0)};`);
const px = (x) => x.toFixed(1);
const line = (x1, y1, x2, y2, more = "") => `<line x1="${px(x1)}" y1="${px(y1)}" x2="${px(x2)}" y2="${px(y2)}" ${more}/>`;
const text = (x, y, said, more = "") => `<text x="${px(x)}" y="${px(y)}" ${more}>${escape(said)}</text>`;
const svg = (width, height, parts) => `<svg viewBox="0 0 ${width} ${height}" width="${width}" height="${height}" aria-hidden="true">${parts.join("")}</svg>`;
const dashes = (one, thick) => (one.dash.length ? `stroke-dasharray="${one.dash.map((x) => x * Math.min(thick, 2)).join(" ")}"` : "");

/** Heads in the order they are drawn: the answer last, on top. */
function drawn({ map, result }) {
  const on = (h) => (h === result.best ? 3 : map.heads[h].is_baseline ? 2 : h === result.runner_up ? 1 : 0);
  return [...map.heads.keys()].sort((g, h) => on(g) - on(h));
}

/** Loss against cost at the context served. */
function curves(latest, width) {
  const { map, asked, result } = latest;
  const { best, rows, runner_up: second } = result;
  const height = width < 480 ? 320 : 400;
  const [left, right, top, bottom] = [46, width - 14, 30, height - 50];
  const [low, all] = [map.losses[0], map.losses.at(-1)];
  const high = Math.min(all, Math.max(low + 0.6 * (all - low), asked.loss + 0.25 * (all - low)));
  const losses = Array.from({ length: POINTS_OF_A_CURVE }, (_, i) => low + ((high - low) * i) / (POINTS_OF_A_CURVE - 1));
  const lines = costCurves(map, asked, losses).map((costs) => costs.flatMap((cost, i) => (Number.isFinite(cost) ? [[cost, losses[i]]] : [])));
  const reached = lines.flat().map(([cost]) => cost);
  const [start, end] = reached.length ? [Math.min(...reached) / 1.1, Math.max(...reached) * 1.1] : [1, 10];
  const x = (cost) => left + ((right - left) * Math.log(cost / start)) / Math.log(end / start);
  const y = (loss) => bottom - ((bottom - top) * (loss - low)) / (high - low);
  const parts = [...costAxis(asked.goal, start, end, x, [left, right, top, bottom], best === null ? 1 : rows[best].cost)];
  for (const tick of evenTicks(low, high)) {
    parts.push(line(left, y(tick), right, y(tick), 'class="grid"'), text(left - 7, y(tick) + 4, decimals[tick % 0.1 > 1e-6 && tick % 0.1 < 0.1 - 1e-6 ? 2 : 1].format(tick), 'text-anchor="end"'));
  }
  parts.push(text(0, 14, "loss, nats per token", 'class="quiet"'));
  parts.push(line(left, y(asked.loss), right, y(asked.loss), 'class="target"'), text(right, y(asked.loss) - 6, `loss ${asked.loss}`, 'class="quiet" text-anchor="end"'));
  for (const h of drawn(latest)) {
    const one = map.heads[h];
    const thick = h === best ? 3.6 : one.is_baseline || h === second ? 2.2 : 1.3;
    const points = lines[h].map(([cost, loss]) => `${px(x(cost))},${px(y(loss))}`).join(" ");
    if (points && h === best) parts.push(`<polyline points="${points}" fill="none" stroke="${map.halo}" stroke-width="13" stroke-linecap="round"/>`);
    if (points) parts.push(`<polyline points="${points}" fill="none" stroke="${one.color}" stroke-width="${thick}" ${dashes(one, thick)}><title>${escape(one.label)}</title></polyline>`);
  }
  const marked = drawn(latest).filter((h) => (h === best || map.heads[h].is_baseline || h === second) && Number.isFinite(rows[h].cost));
  const taken = [];
  for (const h of marked.reverse()) parts.push(...mark(map.heads[h], rows[h], h === best, x, y(asked.loss), [left, right], taken));
  return svg(width, height, parts);
}

/** The cost of a head configuration at the loss asked for: a point, 95% of the draws, and its name where there is room. */
function mark(one, row, isBest, x, y, [left, right], taken) {
  const inside = (cost) => Math.min(right, Math.max(left, x(cost)));
  const [low, high] = row.cost_interval;
  const at = x(row.cost);
  const parts = [];
  if (!Number.isNaN(low)) parts.push(line(inside(low), y, inside(high), y, `stroke="${one.color}" stroke-width="8" stroke-opacity="0.35" stroke-linecap="round"`));
  parts.push(`<circle cx="${px(at)}" cy="${px(y)}" r="${isBest ? 6 : 4}" fill="${isBest ? one.color : "#fff"}" stroke="${one.color}" stroke-width="2"/>`);
  const said = isBest ? `${one.label}, the answer` : one.label;
  const wide = said.length * 7.4 + 8;
  const start = Math.min(Math.max(isBest ? at - wide + 8 : at + 4, left), right - wide);
  let down = isBest ? 24 : -14;
  while (taken.some(([x0, x1, d]) => d === down && start < x1 && x0 < start + wide)) down += down > 0 ? 17 : -17;
  taken.push([start, start + wide, down]);
  parts.push(text(start, y + down, said, `class="name${isBest ? " best" : ""}"`));
  return parts;
}

/** A row for each head configuration, the answer first: what it costs at the loss asked for, and 95% of the draws. */
function costs({ map, asked, result }, width) {
  const { unit } = asked.goal;
  const { rows, best, order } = result;
  const known = order.filter((h) => Number.isFinite(rows[h].cost));
  const beside = width < 420 ? 0 : MORE;
  const [left, right, top] = [LABEL, width - beside - 10, 8];
  const bottom = top + ROW * order.length + 4;
  const least = known.length ? Math.min(...known.map((h) => rows[h].cost)) : 1;
  const far = HORIZON * least;
  const ends = known.flatMap((h) => [...rows[h].cost_interval, rows[h].cost]).filter((x) => x > 0 && x < far);
  const [start, end] = ends.length ? [Math.min(...ends) / 1.03, Math.max(...ends) * 1.05] : [1, 10];
  const x = (cost) => left + ((right - left) * Math.log(Math.min(Math.max(cost, start), end) / start)) / Math.log(end / start);
  const parts = [];
  order.forEach((h, i) => {
    const [one, row] = [map.heads[h], rows[h]];
    const y = top + ROW * (i + 0.5);
    if (h === best) parts.push(`<rect x="0" y="${px(y - ROW / 2)}" width="${width}" height="${ROW}" fill="${map.halo}" fill-opacity="0.55"/>`);
    parts.push(line(0, y, 20, y, `stroke="${one.color}" stroke-width="${h === best ? 3.6 : 2.2}" ${dashes(one, 2)}`));
    parts.push(text(27, y + 4, one.label, `class="${h === best ? "name best row" : ""}"`));
    if (!Number.isFinite(row.cost)) return parts.push(text(left + 6, y + 4, Number.isFinite(row.n_params) ? (row.edge ? "at the edge of what can be served" : "not served so") : "not reached", 'class="quiet"'));
    const [low, high] = row.cost_interval;
    const label = `${one.label}: ${[amount(row.cost, unit), range(amounts(row.cost_interval, unit)), !Number.isNaN(row.probability) && `cheapest in ${percent(row.probability)}`].filter(Boolean).join(", ")}`;
    const bar = Number.isNaN(low) ? "" : line(x(low), y, x(high), y, `stroke="${one.color}" stroke-width="5" stroke-opacity="0.4" stroke-linecap="round"`);
    const point = row.cost > end ? `<path d="M${px(right - 5)} ${px(y - 5)} L${px(right + 3)} ${px(y)} L${px(right - 5)} ${px(y + 5)} Z" fill="${one.color}"/>` : `<circle cx="${px(x(row.cost))}" cy="${px(y)}" r="${h === best ? 6 : 4.5}" fill="${h === best ? one.color : "#fff"}" stroke="${one.color}" stroke-width="2"/>`;
    parts.push(`<g>${bar}${point}<title>${escape(label)}</title></g>`);
    if (beside) parts.push(text(width, y + 4, h === best ? "the answer" : moreText(row.more), `text-anchor="end" class="${h === best ? "name best row" : "quiet"}"`));
  });
  parts.unshift(...costAxis(asked.goal, start, end, x, [left, right, top, bottom], least));
  return svg(width, bottom + 50, parts);
}

/** Ticks, lines and the name of a logarithmic axis of costs, which says where cheaper is. */
function costAxis(goal, start, end, x, [left, right, top, bottom], typical) {
  const [unit, word] = axisUnit(typical);
  const parts = [line(left, bottom, right, bottom, 'class="axis"')];
  let last = -Infinity;
  for (const tick of roundNumbers(start / unit, end / unit)) {
    const at = x(tick * unit);
    parts.push(line(at, top, at, bottom, 'class="grid"'));
    if (at - last < 38) continue;
    last = at;
    parts.push(text(at, bottom + 18, goal.unit === "US dollars" ? `$${tick}` : String(tick), 'text-anchor="middle"'));
  }
  const units = [word, goal.unit === "US dollars" ? "" : goal.unit].filter(Boolean).join(" of ").replace(/ of (seconds)/, " $1");
  parts.push(text(left, bottom + 40, "← cheaper", 'class="name"'), text(right, bottom + 40, goal.label + (units && `, ${units}`), 'class="quiet" text-anchor="end"'));
  return parts;
}

/** What an axis is divided by so that its ticks are short, and the word for that. */
function axisUnit(value) {
  const [size, , , word] = UNITS.find(([size]) => value >= 10 * size) ?? [1, "", "", ""];
  return [size, word && `${word.trim()}s`];
}

/** Ticks of a logarithmic axis: enough of 1, 2, 5 times powers of ten. */
function roundNumbers(low, high) {
  const powers = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++) powers.push(power);
  let ticks = [];
  for (const steps of [[1], [1, 3], [1, 2, 5], [1, 1.5, 2, 3, 4, 5, 6, 8], Array.from({ length: 18 }, (_, i) => 1 + i / 2), Array.from({ length: 90 }, (_, i) => 1 + i / 10)]) {
    ticks = powers.flatMap((power) => steps.map((step) => Number((step * 10 ** power).toPrecision(3)))).filter((x) => x >= low && x <= high);
    if (ticks.length >= 3) break;
  }
  return ticks;
}

/** About five losses between two. */
function evenTicks(low, high) {
  const step = [0.05, 0.1, 0.2, 0.5, 1, 2].find((one) => (high - low) / one <= 7) ?? 5;
  const first = Math.ceil(low / step - 1e-9);
  return Array.from({ length: Math.floor(high / step + 1e-9) - first + 1 }, (_, i) => (first + i) * step);
}
