// Numbers as text, written as gqa_jax.formatting and words.py do. What is not known is never a number: it is empty, or said in words.

export const UNITS = [[1e21, "Z", "Z", " sextillion"], [1e18, "E", "E", " quintillion"], [1e15, "P", "P", " quadrillion"], [1e12, "T", "T", " trillion"], [1e9, "B", "G", " billion"], [1e6, "M", "M", " million"], [1e3, "k", "k", " thousand"]];
const [COUNT, SI, NAME] = [1, 2, 3]; // what each is called: of counted things, of a unit, in words
export const decimals = [0, 1, 2, 3, 4, 5, 6, 7, 8].map((n) => new Intl.NumberFormat("en", { minimumFractionDigits: n, maximumFractionDigits: n }));

export function three(value) {
  if (value === 0) return "0";
  const size = Math.floor(Math.log10(Math.abs(value) * (1 + 5e-4)));
  return decimals[Math.min(8, Math.max(0, 2 - size))].format(value);
}

function scaled(value, ending, before = "") {
  const unit = UNITS.find(([size]) => value >= 0.9995 * size);
  return unit ? three(value / unit[0]) + before + unit[ending] : three(value);
}

export const long = (value) => scaled(value, NAME);

/** A number of parameters; those of no model are not told apart. */
export function size(value) {
  if (Number.isNaN(value)) return "";
  return value < 1e3 ? "<1k" : value > 1e13 ? ">10T" : scaled(value, COUNT);
}

/** A cost, with its unit where that is dollars, seconds or bytes. */
export function amount(value, unit) {
  if (!Number.isFinite(value)) return "";
  if (unit === "seconds") return seconds(value);
  if (unit === "US dollars") return usd(value);
  if (unit !== "bytes") return scaled(value, SI);
  return value >= 999.5 ? `${scaled(value, SI, " ")}B` : `${three(value)} B`;
}

/** Shares of draws to a percent: 1,000 draws don't know more. */
export function percent(share) {
  if (Number.isNaN(share)) return "unknown";
  return share > 0 && share < 0.005 ? "<1%" : share >= 0.995 && share < 1 ? ">99%" : `${decimals[0].format(100 * share)}%`;
}

/** What something costs more, as words.py says it: 5.1% more, 2.4 times as much. Empty where not known. */
export function moreText(share) {
  if (Number.isNaN(share)) return "";
  if (share >= 10) return "over 10 times as much";
  if (share >= 1) return `${decimals[1].format(1 + share)} times as much`;
  return share < 5e-4 ? "<0.1% more" : `${decimals[1].format(100 * share)}% more`;
}

const tenths = (share, largest) => (Math.abs(share) >= largest ? `>${100 * largest}%` : `${decimals[1].format(100 * Math.abs(share))}%`);

/** A saving with its direction: 32.0% less, 4.1% more. Empty where not known; `largest`: what is beyond it is not told apart. */
export function savingText(share, largest) {
  if (Number.isNaN(share)) return "";
  return Math.abs(share) < 5e-4 ? "the same" : `${tenths(share, largest)} ${share > 0 ? "less" : "more"}`;
}

/** The interval of a saving, of which the saving before it says whether it is less or more: 28.6% to 34.9%. */
export function savingBetween([low, high], largest) {
  if (Number.isNaN(low) || Number.isNaN(high)) return "";
  if (low >= 0) return `${tenths(low, largest)} to ${tenths(high, largest)}`;
  if (high <= 0) return `${tenths(high, largest)} to ${tenths(low, largest)}`;
  return `${savingText(low, largest)} to ${savingText(high, largest)}`;
}

/** Both ends as `text` writes them; one at `within` or beyond is none. */
function interval([low, high], text, within, anything) {
  if (Number.isNaN(low) || Number.isNaN(high)) return "";
  const [below, above] = [low <= within[0], high >= within[1]];
  if (below && above) return anything;
  if (above) return `at least ${text(low)}`;
  return below ? `at most ${text(high)}` : `${text(low)} to ${text(high)}`;
}

export const sizes = (ends) => (ends[1] < 1e3 || ends[0] > 1e13 ? size(ends[0]) : interval(ends, size, [1e3, 1e13], "any size"));
export const amounts = (ends, unit) => interval(ends, (value) => amount(value, unit), [-Infinity, Infinity], "any cost");

export const seconds = (value) => (value < 0.1 ? `${three(1000 * value)} ms` : `${three(value)} s`);
export const usd = (value) => `$${value >= 9999.5 ? scaled(value, SI) : three(value)}`;
export const range = (text) => text && `95%: ${text}`;
export const contextLabel = (tokens) => (tokens % 1024 === 0 ? `${tokens / 1024}K` : decimals[0].format(tokens));
export const counted = (count, noun) => `${decimals[0].format(count)} ${noun}${count === 1 ? "" : "s"}`;
/** What follows numbers that don't say their unit themselves. */
export const unitText = (unit) => (["", "seconds", "US dollars", "bytes"].includes(unit) ? "" : `, ${unit}`);
