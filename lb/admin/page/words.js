// Numbers and times as people read them.

const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const short = new Intl.NumberFormat("en", { notation: "compact", maximumSignificantDigits: 3 });
const two = "2-digit";
const clock = new Intl.DateTimeFormat(undefined, { hour: two, minute: two, second: two, hourCycle: "h23" });
const UNITS = [["d", 86400], ["h", 3600], ["min", 60], ["s", 1]];

export const count = (n) => (n < 1e6 ? whole.format(n) : short.format(n));
export const rate = (n) => (n === 0 ? "0" : n < 0.05 ? "<0.1" : n < 10 ? n.toFixed(1) : count(n));
export const percent = (share) =>
  share > 0 && share < 0.001 ? "<0.1 %" : `${Number((share * 100).toFixed(share < 0.1 ? 1 : 0))} %`;
export const at = (seconds) => clock.format(new Date(seconds * 1000));
export const several = (n, one, many = `${one}s`) => `${count(n)} ${n === 1 ? one : many}`;

// A length of time: 12 s, 3 min 20 s, 2 h 5 min; with `most` 1: 12 s, 3 min, 2 h.
export function time(seconds, most = 2) {
  let left = Math.max(0, Math.round(seconds));
  const said = [];
  for (const [unit, size] of UNITS) {
    const n = Math.floor(left / size);
    left -= n * size;
    if (n > 0) said.push(`${n} ${unit}`);
    else if (said.length) break;
    if (said.length === most) break;
  }
  return said.join(" ") || "0 s";
}

export const ago = (seconds, most = 2) => (seconds < 1.5 ? "now" : `${time(seconds, most)} ago`);

export const milliseconds = (seconds) => {
  const ms = seconds * 1000;
  return `${ms < 10 ? ms.toFixed(1) : Math.round(ms)} ms`;
};

export const sum = (numbers) => numbers.reduce((a, b) => a + b, 0);
