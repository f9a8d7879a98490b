// One service: its backends, its verdicts, its config IDs.

import { Ring, Sparkline, Verdicts, sparkTop } from "./charts.js";
import { Parts, el, mark, write } from "./dom.js";
import { CONFIG_IDS, PHASES, STATES, WORST_FIRST, badge } from "./states.js";
import { ago, count, milliseconds, percent, rate, several, sum, time } from "./words.js";

export const MOST_ROWS = 200; // backends of a service that are drawn
const QUIET = 5; // seconds without a packet

export class Service {
  constructor(changes, isOpen) {
    this.title = el("h2", {});
    this.listen = el("span", { class: "listen" });
    this.chips = el("ul", { class: "chips" });
    this.states = new Parts(this.chips, ([state]) => state, () => new Chip());
    this.trust = el("span", { class: "alarm", text: "fail-open: health checks are not believed", hidden: true });
    const summary = el("summary", {}, this.title, this.listen, this.chips, this.trust);
    this.node = el("details", { class: "card service", open: isOpen, ontoggle: () => this.draw() }, summary);
    this.changes = changes;
    this.body = null;
  }

  // `histories` and `slots` are by service; `matches(service)` says which backends to draw.
  update(service, { state, histories, slots, matches }) {
    this.latest = [service, state, histories[service.name], slots[service.name], matches(service)];
    write(this.title, service.name);
    write(this.listen, service.listen.join(", "));
    const by = numbers(service.backends);
    this.states.update(WORST_FIRST.filter((name) => by.has(name)).map((name) => [name, by.get(name)]));
    this.trust.hidden = !service["fail-open"];
    this.draw();
  }

  // What is closed costs nothing.
  draw() {
    if (!this.node.open || !this.latest) return;
    if (this.body === null) {
      this.body = new Body(this.changes);
      this.node.append(this.body.node);
    }
    this.body.update(...this.latest);
  }
}

// How many are in each state.
function numbers(backends) {
  const by = new Map();
  for (const { state } of backends) by.set(state, (by.get(state) ?? 0) + 1);
  return by;
}

class Chip {
  constructor() {
    this.shape = badge();
    this.text = el("span", {});
    this.node = el("li", { class: "state" }, this.shape.node, this.text);
  }

  update([state, n]) {
    this.shape.update(state);
    mark(this.node, "data-state", state);
    write(this.text, `${count(n)} ${state}`);
  }
}

class Body {
  constructor(changes) {
    this.ring = new Ring();
    this.verdicts = new Verdicts();
    this.numbers = new Parts(el("dl", { class: "numbers" }), ({ name }) => name, () => new Figure());
    this.slots = new Parts(el("ol", { class: "slots" }), (slot) => slot["config-id"], () => new Slot());
    this.table = new Table(changes);
    this.node = el(
      "div",
      { class: "body" },
      el("div", {}, el("h3", { text: "Shares of new connections" }), this.ring.node),
      el("div", {}, el("h3", { text: "Packets from clients, by what became of them" }), this.verdicts.node),
      this.numbers.parent,
      el("div", { class: "rotation" }, el("h3", { text: "Config IDs" }), this.slots.parent),
      this.table.node,
    );
  }

  update(service, state, history, slots, wanted) {
    this.ring.update(service.backends);
    this.verdicts.update(history?.verdicts, service.verdicts);
    this.numbers.update(figures(service));
    const known = new Map([...(slots ?? []), ...service["cid-configs"]].map((slot) => [slot["config-id"], slot]));
    this.slots.update(CONFIG_IDS.map((id) => known.get(id) ?? { "config-id": id, phase: "free" }));
    this.table.update(service, state, history?.backends ?? {}, wanted);
  }
}

function figures(service) {
  const why = Object.entries(service.unroutable).filter(([, n]) => n > 0).sort(([, a], [, b]) => b - a);
  return [
    {
      name: "connections that moved",
      value: service.moves,
      title: "Flows that began in the middle of a connection: its client has another address, and it was found again.",
    },
    {
      name: "that a 4-tuple balancer would have broken",
      value: service.rescued,
      title: "Those of them that a balancer that looks at addresses only would have sent to another server.",
    },
    {
      name: "resets answered",
      value: service.resets.answered,
      title: "Packets for dead servers that were answered with a stateless reset.",
    },
    {
      name: "resets pushed",
      value: service.resets.pushed,
      title: "Stateless resets for clients of dead servers that did not wait for a packet.",
    },
    {
      name: "CIDs that did not say where",
      value: sum(why.map(([, n]) => n)),
      note: why.map(([reason, n]) => `${reason.replaceAll("_", " ")} ${count(n)}`).join(", "),
      title: "Packets whose connection ID did not decide. What was done instead is in the chart.",
    },
  ];
}

class Figure {
  constructor() {
    this.name = el("dt", {});
    this.value = el("dd", {});
    this.note = el("dd", { class: "small" });
    this.node = el("div", {}, this.name, this.value, this.note);
  }

  update({ name, value, note = "", title }) {
    write(this.name, name);
    write(this.value, count(value));
    write(this.note, note);
    mark(this.node, "title", title);
  }
}

class Slot {
  constructor() {
    this.id = el("span", { class: "id" });
    this.phase = el("span", { class: "phase" });
    this.steps = el("span", { class: "steps", "aria-hidden": "true" });
    this.steps.append(...Object.keys(PHASES).slice(1).map((phase) => el("i", { "data-phase": phase })));
    this.lines = el("span", { class: "lines" });
    this.parts = new Parts(this.lines, ([key]) => key, () => new Line());
    this.node = el("li", { class: "slot" }, el("span", { class: "head" }, this.id, this.phase), this.steps, this.lines);
  }

  update(slot) {
    mark(this.node, "data-phase", slot.phase);
    mark(this.node, "title", PHASES[slot.phase]);
    write(this.id, slot["config-id"]);
    write(this.phase, slot.phase);
    this.parts.update(slotLines(slot));
  }
}

function slotLines(slot) {
  const lines = [];
  if (slot.algorithm) lines.push(["algorithm", slot.algorithm]);
  if (slot["packets-per-second"] !== undefined && (slot.phase !== "free" || slot.packets > 0)) {
    lines.push(["rate", `${rate(slot["packets-per-second"])} packets/s`]);
  }
  if (slot["last-packet"] >= QUIET) lines.push(["last", `quiet for ${time(slot["last-packet"])}`]);
  if (typeof slot["key-age"] === "number") lines.push(["key", `key ${time(slot["key-age"])} old`]);
  const freeIn = slot["free-in"];
  if (slot.phase === "retiring") lines.push(["free", freeIn > 0 ? `free in ${time(freeIn)}` : "may be freed"]);
  if (slot.phase === "free" && freeIn > 0) lines.push(["free", `not to be reused for ${time(freeIn)}`]);
  return lines.filter(([, text]) => text);
}

class Line {
  constructor() {
    this.node = el("span", {});
  }

  update([, text]) {
    write(this.node, text);
  }
}

const COLUMNS = ["State", "Backend", "Share", "Flows", "Packets per second", "Weight", "Last packet", "Probe"];

// Roles are said aloud: in a narrow window it is laid out otherwise, and would be a table no more.
class Table {
  constructor(changes) {
    this.note = el("p", { class: "hint" });
    const head = el("tr", { role: "row" });
    const heading = (...children) => el("th", { role: "columnheader", scope: "col" }, ...children);
    head.append(...COLUMNS.map((text) => heading(text)), heading(el("span", { class: "unseen", text: "Changes" })));
    const body = el("tbody", { role: "rowgroup" });
    this.rows = new Parts(body, (backend) => backend.name, () => new Row(changes));
    const table = el("table", { role: "table" }, el("thead", { role: "rowgroup" }, head), body);
    this.node = el("div", { class: "backends" }, el("h3", { text: "Backends" }), this.note, table);
  }

  update(service, state, histories, wanted) {
    const all = service.backends.filter((backend) => wanted(backend));
    const shown = all.length <= MOST_ROWS ? all : worst(all).slice(0, MOST_ROWS);
    this.note.hidden = shown.length === service.backends.length;
    const of = several(service.backends.length, "backend");
    write(
      this.note,
      shown.length < all.length
        ? `${count(shown.length)} of ${count(all.length)} are shown, the worst first. The box above finds the others.`
        : `${count(all.length)} of ${of} ${all.length === 1 ? "matches" : "match"}.`,
    );
    const top = sparkTop(shown.map((backend) => histories[backend.name] ?? []));
    this.rows.update(shown, service, state, histories, top);
  }
}

function worst(backends) {
  const place = (backend) => WORST_FIRST.indexOf(backend.state);
  return [...backends].sort((a, b) => place(a) - place(b) || b["packets-per-second"] - a["packets-per-second"]);
}

class Row {
  constructor(changes) {
    const cell = (name, ...children) => el("td", { role: "cell", class: name }, ...children);
    this.shape = badge();
    this.state = el("span", {});
    this.since = el("span", { class: "small" });
    this.badge = el("span", { class: "state" }, this.shape.node, this.state);
    this.name = el("span", { class: "name" });
    this.address = el("span", { class: "address" });
    this.note = el("span", { class: "note" });
    this.bar = el("span", { class: "fill" });
    this.share = el("span", {});
    this.flows = el("span", {});
    this.rate = el("span", { class: "rate" });
    this.spark = new Sparkline();
    this.weight = el("span", {});
    this.force = el("span", { class: "small" });
    this.last = el("span", {});
    this.probe = el("span", {});
    const make = ([text, act]) => new Button(text, changes, act);
    this.buttons = new Parts(el("div", { class: "buttons" }), ([text]) => text, make);
    this.node = el(
      "tr",
      { role: "row" },
      cell("is", this.badge, this.since),
      cell("who", this.name, this.address, this.note),
      cell("share", el("span", { class: "bar" }, this.bar), this.share),
      cell("flows", this.flows),
      cell("traffic", this.rate, this.spark.node),
      cell("weight", this.weight, this.force),
      cell("last", this.last),
      cell("probe", this.probe),
      cell("change", this.buttons.parent),
    );
    ["", "", "Share", "Flows", "Packets/s", "Weight", "Last packet", "Probe", ""].forEach((label, i) => {
      if (label) this.node.children[i].dataset.label = label;
    });
  }

  update(backend, service, state, histories, top) {
    const { name, state: is } = backend;
    mark(this.node, "data-state", is);
    mark(this.node, "data-backend", name);
    this.shape.update(is);
    write(this.state, is);
    mark(this.badge, "data-state", is);
    mark(this.badge, "title", STATES[is]?.says ?? null);
    write(this.since, backend.since === null ? "" : `for ${time(state.now - backend.since)}`);
    write(this.name, name);
    write(this.address, backend.address);
    write(this.note, remarks(backend));
    this.bar.style.width = `${backend["ring-share"] * 100}%`;
    write(this.share, percent(backend["ring-share"]));
    write(this.flows, count(backend.flows));
    write(this.rate, rate(backend["packets-per-second"]));
    this.spark.update(histories[name] ?? [], top);
    write(this.weight, backend.weight);
    const force = backend["effective-weight"];
    write(this.force, Math.abs(force - backend.weight) < 0.005 ? "" : `${Number(force.toFixed(1))} now`);
    write(this.last, backend["last-packet"] === null ? "none seen" : ago(backend["last-packet"]));
    write(this.probe, backend["round-trip"] === null ? "-" : milliseconds(backend["round-trip"]));
    this.buttons.update(state.rights === "write" ? buttons(backend) : [], { state, service, backend });
  }
}

function remarks(backend) {
  const said = [];
  if (backend.reason && ["down", "dead"].includes(backend.state)) said.push(backend.reason);
  const quiet = backend["last-packet"];
  if (backend.state !== "active" && quiet >= QUIET) said.push(`quiet for ${time(quiet)}`);
  if (backend.unreachable > 0) said.push(`${several(backend.unreachable, "ICMP error")}`);
  if (backend.overridden.length) said.push(`by the operator: ${backend.overridden.join(", ")}`);
  return said.join("; ");
}

function buttons(backend) {
  return [
    backend.drain ? ["Undrain", "undrain"] : ["Drain", "drain"],
    ["Weight", "weigh"],
    backend.fence ? ["Unfence", "unfence"] : ["Fence", "fence"],
    ...(backend.overridden.length ? [["As in file", "asInFile"]] : []),
  ];
}

class Button {
  constructor(text, changes, act) {
    this.text = text;
    this.node = el("button", {
      type: "button",
      text,
      onclick: () => changes[act](this.at.state, this.at.service, this.at.backend),
    });
  }

  update(_, at) {
    this.at = at;
    mark(this.node, "aria-label", `${this.text} ${at.backend.name}`);
  }
}
