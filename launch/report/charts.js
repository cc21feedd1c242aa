// The charts of the explorer: fills the data sources of the Bokeh models that charts.py makes.

import { costCurve } from "./explorer.js";
import { percent, regretText, span, UNITS } from "./numbers.js";

const POINTS_OF_A_CURVE = 64;
const HORIZON = 40; // extra costs beyond so many times the runner-up's are at the edge of their chart
const ENDS = [0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 2, 5]; // of the axis of extra costs, or the largest of them
const FONT_SIZE = "12px";
const [ROW, AXIS] = [19, 48]; // pixels of a head configuration, and of what is below them

export class Charts {
  /** `items`: JSON of charts.py by name; their places are elements chart-NAME. */
  constructor(items) {
    this.items = items;
    this.charts = {};
    this.latest = null; // what `show` was last given
    this.palette = {};
    this.labelled = 0; // rows that have had a label
  }

  async open() {
    for (const [name, item] of Object.entries(this.items)) {
      const place = document.getElementById(`chart-${name}`);
      const { roots } = await Bokeh.embed.embed_item(item, place.id);
      this.charts[name] = { view: roots[0], root: roots[0].model, parts: {}, seen: true, stale: false };
    }
    // What is not in the window is drawn when it comes there.
    const observer = new IntersectionObserver(
      (entries) => {
        for (const entry of entries) {
          const name = entry.target.id.replace("chart-", "");
          this.charts[name].seen = entry.isIntersecting;
          if (entry.isIntersecting && this.charts[name].stale) this.draw(name);
        }
      },
      { rootMargin: "25%" },
    );
    for (const name of Object.keys(this.charts)) observer.observe(document.getElementById(`chart-${name}`));
  }

  /** The model of that name in a chart. */
  part(chart, name) {
    const { parts, root } = this.charts[chart];
    return (parts[name] ??= [...root.references()].find((one) => one.name === name));
  }

  /** A row for each candidate of a study. */
  arrange(model) {
    const count = model.n_candidates;
    this.labelled = Math.max(this.labelled, count); // Bokeh destroys labels that go, keeps them, and complains when they come again
    const labels = Array.from({ length: this.labelled }, (_, h) => [h, h < count ? model.heads[h].label : ""]);
    for (const name of ["regret", "probability"]) {
      const { root } = this.charts[name];
      root.height = ROW * count + AXIS;
      root.y_range.setv({ start: count - 0.4, end: -0.6 });
      root.left[0].ticker.ticks = Array.from({ length: count }, (_, h) => h);
      root.left[0].major_label_overrides = new Map(labels);
    }
    this.color();
  }

  /** Gives the charts the colours and type of the page, light or dark. */
  color() {
    const style = getComputedStyle(document.documentElement);
    const value = (name) => style.getPropertyValue(`--${name}`).trim();
    for (const name of ["ink", "muted", "rule", "paper", "best", "other", "baseline"]) this.palette[name] = value(name);
    const { ink, muted, rule, paper } = this.palette;
    const font = value("sans");
    for (const { root } of Object.values(this.charts)) {
      for (const axis of [...root.left, ...root.below]) {
        axis.setv({ major_label_text_color: ink, major_label_text_font: font, major_label_text_font_size: FONT_SIZE });
        axis.setv({ axis_label_text_color: muted, axis_label_text_font: font, axis_label_text_font_size: FONT_SIZE });
      }
      for (const one of root.center) if ("grid_line_color" in one) one.grid_line_color = rule;
    }
    this.part("curves", "target").line_color = muted;
    this.part("curves", "mark_labels").setv({ text_font: font, background_fill_color: paper });
  }

  /** Shows what `search` has found: at once where it can be seen. */
  show(model, asked, result) {
    this.latest = { model, asked, result };
    for (const [name, chart] of Object.entries(this.charts)) {
      chart.stale = true;
      if (chart.seen) this.draw(name);
    }
  }

  drawAll() {
    for (const name of Object.keys(this.charts)) this.draw(name);
  }

  draw(name) {
    this.charts[name].stale = false;
    if (this.latest) this[name](this.latest);
  }

  colorOf(h, { model, result }) {
    return h === result.best ? this.palette.best : h === model.baseline ? this.palette.baseline : null;
  }

  /** Loss against cost. */
  curves(latest) {
    const { model, asked, result } = latest;
    const { best } = result;
    const { baseline } = model;
    const [low, all] = model.ranges.loss;
    const high = Math.min(all, Math.max(low + 0.6 * (all - low), asked.loss + 0.25 * (all - low)));
    const losses = Array.from({ length: POINTS_OF_A_CURVE }, (_, i) => low + ((high - low) * i) / (POINTS_OF_A_CURVE - 1));
    const [unit, word] = axisUnit(best === null ? 1 : result.rows[best].cost);
    const on = (h) => (h === best ? 2 : h === baseline ? 1 : 0); // what lies on what
    const lines = { xs: [], ys: [], color: [], width: [], dash: [], label: [] };
    let [least, most] = [Infinity, -Infinity];
    for (const h of [...model.heads.keys()].sort((g, h) => on(g) - on(h))) {
      const costs = costCurve(model, asked, losses, h).map((cost) => cost / unit);
      const reached = [...losses.keys()].filter((i) => Number.isFinite(costs[i]));
      if (reached.length === 0) continue;
      least = Math.min(least, costs[reached.at(-1)]);
      most = Math.max(most, costs[reached[0]]);
      lines.xs.push(reached.map((i) => costs[i]));
      lines.ys.push(reached.map((i) => losses[i]));
      lines.color.push(this.colorOf(h, latest) ?? this.palette.other);
      lines.width.push([1.1, 2.4, 3.2][on(h)]);
      lines.dash.push(on(h) === 1 ? [6, 3] : []);
      lines.label.push(model.heads[h].label);
    }
    const marks = { x: [], y: [], low: [], high: [], color: [], marker: [], label: [], align: [] };
    for (const h of new Set([baseline, best])) {
      const row = h === baseline ? result.baseline : result.rows[h];
      if (h === null || row === null || !Number.isFinite(row.cost)) continue;
      marks.x.push(row.cost / unit);
      marks.y.push(asked.loss);
      marks.low.push(row.cost_interval[0] / unit);
      marks.high.push(Math.min(row.cost_interval[1] / unit, most));
      marks.color.push(this.colorOf(h, latest));
      marks.marker.push(h === best ? "circle" : "diamond");
      marks.label.push(model.heads[h].label);
      marks.align.push(h === best && baseline !== null && baseline !== best ? "right" : "left");
    }
    const { root } = this.charts.curves;
    const units = [word, asked.objective.unit].filter(Boolean).join(" ");
    const [start, end] = Number.isFinite(least) ? [least / 1.15, most * 1.05] : [1, 10];
    root.below[0].ticker.ticks = roundNumbers(start, end);
    root.below[0].axis_label = asked.objective.label + (units && ` (${units})`);
    root.x_range.setv({ start, end });
    root.y_range.setv({ start: low, end: high });
    this.part("curves", "target").location = asked.loss;
    this.part("curves", "lines").data = lines;
    this.part("curves", "marks").data = marks;
  }

  /** What each costs beyond the cheapest. */
  regret(latest) {
    const { model, result } = latest;
    const { largest_regret: largest } = model;
    const text = (share) => regretText(share, largest);
    const second = result.runner_up === null ? 0 : result.rows[result.runner_up].regret_interval[1];
    const near = result.rows.map((row) => row.regret_interval[1]).filter((x) => x <= HORIZON * Math.max(second, 0.01));
    const end = ENDS.find((one) => one >= Math.max(0, ...near)) ?? largest;
    const data = { y: [], x: [], low: [], high: [], color: [], marker: [], label: [] };
    result.rows.forEach((row, h) => {
      if (Number.isNaN(row.expected_regret)) return;
      const [low, high] = row.regret_interval;
      data.y.push(h);
      data.x.push(Math.min(row.expected_regret, end));
      data.low.push(Math.min(low, end));
      data.high.push(Math.min(high, end));
      data.color.push(this.colorOf(h, latest) ?? this.palette.muted);
      data.marker.push(row.expected_regret > end || row.expected_regret >= largest ? "inverted_triangle" : h === model.baseline ? "diamond" : "circle");
      data.label.push(`${model.heads[h].label}: ${text(row.expected_regret)} (95%: ${span(row.regret_interval, text)})`);
    });
    this.charts.regret.root.x_range.setv({ start: -0.025 * end, end: end * 1.03 });
    this.part("regret", "regret").data = data;
  }

  /** How often each is the cheapest. */
  probability(latest) {
    const { model, result } = latest;
    const known = [...result.rows.keys()].filter((h) => !Number.isNaN(result.rows[h].probability));
    this.part("probability", "probability").data = {
      y: known,
      right: known.map((h) => result.rows[h].probability),
      color: known.map((h) => this.colorOf(h, latest) ?? this.palette.muted),
      label: known.map((h) => `${model.heads[h].label}: ${percent(result.rows[h].probability)}`),
    };
  }
}

/** What an axis is divided by so that its ticks are short, and the word for that. */
function axisUnit(value) {
  const [size, , word] = UNITS.find(([size]) => value >= 10 * size) ?? [1, "", ""];
  return [size, word && `${word.trim()}s`];
}

/** Ticks of a logarithmic axis: enough of 1, 2, 5 times powers of ten. */
function roundNumbers(low, high) {
  const powers = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++) powers.push(power);
  let ticks = [];
  for (const steps of [[1], [1, 3], [1, 2, 5], [1, 1.5, 2, 3, 4, 5, 6, 8]]) {
    ticks = powers.flatMap((power) => steps.map((step) => Number(`${step}e${power}`))).filter((x) => x >= low && x <= high);
    if (ticks.length >= 4) break;
  }
  return ticks;
}
