// Numbers as text, written as words.py does.

export const UNITS = [[1e21, "Z", " sextillion"], [1e18, "E", " quintillion"], [1e15, "P", " quadrillion"], [1e12, "T", " trillion"], [1e9, "B", " billion"], [1e6, "M", " million"], [1e3, "k", " thousand"]];
export const decimals = [0, 1, 2, 3, 4, 5, 6, 7, 8].map((n) => new Intl.NumberFormat("en", { minimumFractionDigits: n, maximumFractionDigits: n }));

export function three(value) {
  if (value === 0) return "0";
  const size = Math.floor(Math.log10(Math.abs(value) * (1 + 5e-4)));
  return decimals[Math.min(8, Math.max(0, 2 - size))].format(value);
}

function scaled(value, ending) {
  if (!Number.isFinite(value)) return "not reached";
  const unit = UNITS.find(([size]) => value >= 0.9995 * size);
  return unit ? three(value / unit[0]) + unit[ending] : three(value);
}

export const short = (value) => scaled(value, 1);
export const long = (value) => scaled(value, 2);

/** Shares of draws to a percent: 1,000 draws don't know more. */
export function percent(share) {
  if (Number.isNaN(share)) return "unknown";
  return share > 0 && share < 0.005 ? "<1%" : share >= 0.995 && share < 1 ? ">99%" : `${decimals[0].format(100 * share)}%`;
}

/** Shares of a cost, to a tenth of a percent. */
export function tenths(share) {
  if (!Number.isFinite(share)) return share === -Infinity ? "not reached" : "unknown";
  const text = decimals[1].format(Math.abs(100 * share));
  return `${share < 0 && text !== "0.0" ? "−" : ""}${text}%`;
}

/** A regret, as gqa_jax.formatting writes it; `largest` is what those beyond it count as. */
export function regretText(share, largest) {
  if (Number.isNaN(share)) return "";
  if (share >= largest - 5e-5) return `>${100 * largest}%`;
  return share > 0 && share < 5e-5 ? "<0.01%" : `${(100 * share).toFixed(2)}%`;
}

export function span([low, high], text) {
  if (high === Infinity) return low === Infinity ? "not reached" : `${text(low)} or more`;
  if (Number.isNaN(low)) return "";
  return low === -Infinity ? `${text(high)} or less` : `${text(low)} to ${text(high)}`;
}

export const seconds = (value) => (value < 0.1 ? `${three(1000 * value)} ms` : `${three(value)} s`);
export const range = (ends, text) => (Number.isNaN(ends[0]) ? "" : `95%: ${span(ends, text)}`);
export const contextLabel = (tokens) => (tokens % 1024 === 0 ? `${tokens / 1024}K` : decimals[0].format(tokens));
export const counted = (count, noun) => `${decimals[0].format(count)} ${noun}${count === 1 ? "" : "s"}`;
export const money = (cost) => (cost.unit === "US dollars" ? (x) => (Number.isFinite(x) ? `$${three(x)}` : "not reached") : null);
export const costText = (cost) => money(cost) ?? ((x) => short(x) + (cost.unit === "seconds" && Number.isFinite(x) ? " s" : ""));
