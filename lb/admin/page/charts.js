// Pictures of numbers, in SVG.

import { el, svg, write } from "./dom.js";
import { BANDS, WORST_FIRST } from "./states.js";
import { count, percent, rate, sum, time } from "./words.js";

const SPARK = { width: 120, height: 26, samples: 120 };
const CHART = { width: 600, height: 150, samples: 300 };
const MOST_ARCS = 120; // of a ring; more are drawn as one arc for each state
const MOST_NAMES = 16;
const DROPPED = BANDS.find(({ key }) => key === "dropped").verdicts;

// Packets per second over the last two minutes. All of one service have the same scale, so that they compare.
export class Sparkline {
  constructor() {
    this.area = svg("path", { class: "area" });
    this.line = svg("path", { class: "line" });
    const viewBox = `0 0 ${SPARK.width} ${SPARK.height}`;
    this.node = svg("svg", { viewBox, class: "spark", role: "img", preserveAspectRatio: "none" }, this.area, this.line);
  }

  update(series, top) {
    const shown = series.slice(-SPARK.samples);
    const x = (i) => ((i + SPARK.samples - shown.length) * SPARK.width) / (SPARK.samples - 1);
    const y = (value) => SPARK.height - 1 - (value / (top || 1)) * (SPARK.height - 3);
    const line = shown.map((value, i) => `${i ? "L" : "M"}${x(i).toFixed(1)} ${y(value).toFixed(1)}`).join("");
    this.line.setAttribute("d", line);
    const end = `V${SPARK.height}H${x(0).toFixed(1)}Z`;
    this.area.setAttribute("d", shown.length > 1 ? line + end : "");
    const [least, most] = shown.length ? [Math.min(...shown), Math.max(...shown)].map(rate) : ["0", "0"];
    this.node.setAttribute("aria-label", `Of the last ${time(SPARK.samples)}: ${least} to ${most} packets per second`);
  }
}

export const sparkTop = (all) => Math.max(1, ...all.map((series) => Math.max(0, ...series.slice(-SPARK.samples))));

// Who gets which part of new connections.
export class Ring {
  constructor() {
    this.arcs = svg("g", {});
    this.names = svg("g", { class: "names" });
    this.number = svg("text", { class: "number", y: "2" });
    this.word = svg("text", { class: "word", y: "19" });
    this.node = svg(
      "svg",
      { viewBox: "-118 -96 236 192", class: "ring", role: "img" },
      svg("circle", { r: "62", class: "track" }),
      this.arcs,
      this.names,
      this.number,
      this.word,
    );
    this.drawn = "";
  }

  update(backends) {
    const active = backends.filter((backend) => backend.state === "active").length;
    write(this.number, `${active}/${backends.length}`);
    write(this.word, "active");
    const parts = arcsOf(backends);
    const drawn = JSON.stringify(parts);
    if (drawn === this.drawn) return;
    this.drawn = drawn;
    this.arcs.replaceChildren();
    this.names.replaceChildren();
    let from = 0;
    const gap = parts.length > 1 ? Math.min(0.004, 0.2 / parts.length) : 0;
    for (const { name, state, share } of parts) {
      const d = arcPath(from + gap / 2, from + share - gap / 2, 62);
      const arc = svg("path", { d, "data-state": state, class: "arc" });
      arc.append(svg("title", { text: `${name}, ${state}: ${percent(share)} of new connections` }));
      this.arcs.append(arc);
      if (share >= 0.05 && parts.length <= MOST_NAMES) this.names.append(nameAt(name, from + share / 2));
      from += share;
    }
    const said = parts.map(({ name, state, share }) => `${name} (${state}) ${percent(share)}`).join(", ");
    this.node.setAttribute("aria-label", `Shares of the ring: ${said || "nobody gets new connections"}`);
  }
}

function arcsOf(backends) {
  const shares = backends.filter((backend) => backend["ring-share"] > 0);
  if (shares.length <= MOST_ARCS) {
    return shares.map((backend) => ({ name: backend.name, state: backend.state, share: backend["ring-share"] }));
  }
  return WORST_FIRST.map((state) => {
    const those = shares.filter((backend) => backend.state === state);
    return { name: `${those.length} backends`, state, share: sum(those.map((backend) => backend["ring-share"])) };
  }).filter(({ share }) => share > 0);
}

function arcPath(from, to, radius) {
  const end = Math.min(to, from + 0.9999);
  const [x1, y1] = onCircle(from, radius);
  const [x2, y2] = onCircle(end, radius);
  return `M${x1} ${y1}A${radius} ${radius} 0 ${end - from > 0.5 ? 1 : 0} 1 ${x2} ${y2}`;
}

function onCircle(part, radius) {
  const angle = (part - 0.25) * 2 * Math.PI;
  return [(Math.cos(angle) * radius).toFixed(2), (Math.sin(angle) * radius).toFixed(2)];
}

function nameAt(name, part) {
  const [x, y] = onCircle(part, 82).map(Number);
  const anchor = x > 12 ? "start" : x < -12 ? "end" : "middle";
  const shown = name.length > 8 ? `${name.slice(0, 7)}…` : name;
  return svg("text", { x: String(x), y: String(y + 4), "text-anchor": anchor, text: shown });
}

// What became of datagrams over the last five minutes: bands on top of each other, and their legend.
export class Verdicts {
  constructor() {
    this.bands = BANDS.map(({ key }) => svg("path", { class: "band", "data-band": key }));
    this.top = el("span", { class: "scale" });
    this.plot = svg(
      "svg",
      { viewBox: `0 0 ${CHART.width} ${CHART.height}`, preserveAspectRatio: "none", role: "img" },
      svg("path", { class: "grid", d: [0.25, 0.5, 0.75].map((y) => `M0 ${CHART.height * y}H${CHART.width}`).join("") }),
      ...this.bands,
      svg("path", { class: "axis", d: `M0 ${CHART.height - 0.5}H${CHART.width}` }),
    );
    this.cursor = el("div", { class: "cursor", hidden: true });
    this.pointed = null; // a sample, counted from the newest
    const plot = el("div", {
      class: "plot",
      onpointermove: (event) => this.point(event),
      onpointerleave: () => this.point(null),
    }, this.plot, this.top, this.cursor);
    const ticks = el("div", { class: "ticks", "aria-hidden": "true" });
    for (const [i, text] of ["5 min ago", "4", "3", "2", "1", "now"].entries()) {
      const tick = el("span", { text });
      tick.style.left = `${i * 20}%`;
      ticks.append(tick);
    }
    this.rows = BANDS.map(({ key, name, verdicts }) => {
      const now = el("span", { class: "now" });
      const total = el("span", { class: "total" });
      const swatch = el("span", { class: "swatch", "data-band": key, "aria-hidden": "true" });
      const title = verdicts.join(", ");
      const node = el("li", { "data-band": key, title }, swatch, el("span", { text: name }), now, total);
      return { node, now, total };
    });
    this.head = el("span", { class: "now", text: "per second" });
    this.legend = el("ul", { class: "legend" });
    this.legend.append(
      el("li", { class: "head" }, el("span"), el("span"), this.head, el("span", { class: "total", text: "in all" })),
      ...this.rows.map((row) => row.node),
    );
    this.node = el("div", { class: "verdicts" }, el("div", { class: "chart" }, plot, ticks), this.legend);
    this.why = el("li", { class: "small", hidden: true });
    this.legend.append(this.why);
    this.series = BANDS.map(() => []);
  }

  // `history` is by verdict and per second, `totals` by verdict since the start.
  update(history, totals) {
    this.totals = BANDS.map(({ verdicts }) => sum(verdicts.map((verdict) => totals[verdict] ?? 0)));
    this.series = BANDS.map(({ verdicts }) => added(verdicts.map((verdict) => history?.[verdict] ?? [])));
    const length = Math.max(0, ...this.series.map((series) => series.length));
    const below = new Array(length).fill(0);
    const edges = this.series.map((series) => {
      series.forEach((value, i) => { below[i] += value; });
      return below.slice();
    });
    const top = niceAbove(Math.max(1, ...below));
    const x = (i) => (((i + CHART.samples - length) * CHART.width) / (CHART.samples - 1)).toFixed(1);
    const y = (value) => (CHART.height * (1 - value / top)).toFixed(1);
    edges.forEach((edge, band) => {
      const under = band ? edges[band - 1] : new Array(length).fill(0);
      const forth = edge.map((value, i) => `${i ? "L" : "M"}${x(i)} ${y(value)}`);
      const back = under.map((value, i) => `L${x(i)} ${y(value)}`).reverse();
      const isSeen = length > 1 && this.series[band].some((value) => value > 0);
      this.bands[band].setAttribute("d", isSeen ? `${forth.join("")}${back.join("")}Z` : "");
    });
    write(this.top, `${rate(top)}/s`);
    const dropped = DROPPED.filter((verdict) => totals[verdict] > 0);
    this.why.hidden = dropped.length === 0;
    const said = dropped.map((verdict) => `${verdict.replaceAll("_", " ")} ${count(totals[verdict])}`);
    write(this.why, `dropped: ${said.join(", ")}`);
    this.say();
  }

  point(event) {
    if (event === null) this.pointed = null;
    else {
      const box = event.currentTarget.getBoundingClientRect();
      const part = Math.min(1, Math.max(0, (event.clientX - box.left) / box.width));
      this.pointed = Math.round((1 - part) * (CHART.samples - 1));
    }
    this.say();
  }

  say() {
    const back = this.pointed ?? 0;
    this.cursor.hidden = this.pointed === null;
    this.cursor.style.left = `${(1 - back / (CHART.samples - 1)) * 100}%`;
    write(this.head, this.pointed === null ? "per second" : `${time(back)} ago`);
    const values = this.series.map((series) =>
      this.pointed === null ? lately(series) : (series[series.length - 1 - back] ?? 0),
    );
    this.rows.forEach(({ node, now, total }, band) => {
      write(now, rate(values[band]));
      write(total, count(this.totals?.[band] ?? 0));
      node.classList.toggle("none", !this.totals?.[band]);
    });
    const said = BANDS.map(({ name }, band) => `${name} ${rate(values[band])}`).join(", ");
    this.plot.setAttribute("aria-label", `Packets per second by what became of them; now: ${said}`);
  }
}

// The mean of the last few, so that the number can be read.
export const lately = (series) => (series.length ? sum(series.slice(-3)) / Math.min(3, series.length) : 0);

function added(all) {
  const length = Math.max(0, ...all.map((series) => series.length));
  const total = new Array(length).fill(0);
  for (const series of all) series.forEach((value, i) => { total[i + length - series.length] += value; });
  return total;
}

function niceAbove(value) {
  const size = 10 ** Math.floor(Math.log10(value));
  return [1, 1.5, 2, 3, 4, 5, 6, 8, 10].map((step) => step * size).find((nice) => nice >= value);
}
