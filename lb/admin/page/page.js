// The status page: asks every second, draws what it is told, and says so when nobody answers.

import { get, keepToken } from "./api.js";
import { Changes } from "./changes.js";
import { lately } from "./charts.js";
import { reasons } from "./dialog.js";
import { Parts, el, mark, write } from "./dom.js";
import { offerServices } from "./explain.js";
import { Service } from "./service.js";
import { ago, at, count, percent, rate, several, sum, time } from "./words.js";

const EVERY = 1000; // ms between two looks; more if answers are slow
const HISTORY_EVERY = 2000;
const BUSY = 4; // times as long as an answer took nothing is asked
const MOST_RETRY = 15000;
const MANY_SERVICES = 8; // more than these are closed at first, if they are well
const NEARLY = 0.9; // of a limit

const byId = (id) => document.getElementById(id);
const [banner, live, main, filter, wanted] = ["banner", "live", "main", "filter", "wanted"].map(byId);
const [found, done] = ["found", "done"].map(byId);

const changes = new Changes((text) => {
  tell(text);
  look();
});
const about = new Parts(byId("about"), ({ key }) => key, () => new Fact());
const tiles = new Parts(byId("tiles"), ({ name }) => name, () => new Tile());
const services = new Parts(byId("services"), ({ name }) => name, (service) => new Service(changes, opens(service)));

let state = null;
let history = null;
let slots = {};
let historyDue = 0; // performance.now()
let goneSince = null; // Date.now()
let failures = 0;
let timer = null;
let looking = false;

document.addEventListener("visibilitychange", () => document.hidden || look());
wanted.addEventListener("input", draw);
wanted.addEventListener("keydown", (event) => {
  if (event.key === "Escape") {
    wanted.value = "";
    draw();
  }
});

// One look at the balancer; the next one is due after it.
async function look() {
  if (looking) return;
  looking = true;
  clearTimeout(timer);
  const began = performance.now();
  let wait = EVERY;
  try {
    const [newState, newSlots] = await Promise.all([get("/v1/state"), get("/v1/rotation")]);
    state = newState;
    slots = newSlots;
    if (performance.now() >= historyDue) {
      const asked = performance.now();
      history = await get("/v1/history");
      historyDue = performance.now() + Math.max(HISTORY_EVERY, BUSY * (performance.now() - asked)) - EVERY / 2;
    }
    back();
    draw();
    wait = Math.max(EVERY, BUSY * (performance.now() - began));
  } catch (error) {
    if (error.status === undefined) throw error; // a mistake of the page's own
    failures += 1;
    wait = Math.min(MOST_RETRY, EVERY * 2 ** Math.min(failures - 1, 10));
    gone(error, wait);
  } finally {
    looking = false;
    timer = setTimeout(() => document.hidden || look(), wait);
  }
}

function back() {
  failures = 0;
  if (goneSince !== null) tell(`quiclb answers again, after ${time((Date.now() - goneSince) / 1000)}.`);
  goneSince = null;
  banner.hidden = true;
  banner.replaceChildren();
  mark(main, "data-stale", null);
  mark(live, "data-live", "live");
  write(live, state.rights === "write" ? "live" : "live, read only");
}

// Nothing came, or nothing good. What is drawn stays, in grey.
function gone(error, wait) {
  mark(main, "data-stale", "");
  mark(live, "data-live", "gone");
  write(live, error.status === 401 ? "locked" : "not live");
  if (error.status === 401) {
    askForToken();
    return;
  }
  goneSince ??= Date.now();
  const lines = error.status === 0
    ? [el("p", { text: `quiclb does not answer, since ${at(goneSince / 1000)}.` })]
    : reasons(error);
  const next = el("p", { class: "small" });
  next.append(
    state ? `What is shown is from ${at(state.now)}. ` : "Nothing is known yet. ",
    `It is asked again in ${time(wait / 1000)}. `,
    el("button", { type: "button", text: "Ask now", onclick: look }),
  );
  banner.replaceChildren(...lines, next);
  banner.hidden = false;
}

function askForToken() {
  if (banner.querySelector("form")) return;
  const input = el("input", { id: "token", type: "password", autocomplete: "off", required: true });
  const form = el(
    "form",
    {
      onsubmit: (event) => {
        event.preventDefault();
        keepToken(input.value);
        banner.replaceChildren();
        banner.hidden = true;
        look();
      },
    },
    el("label", { for: "token", text: "quiclb wants a token. It is kept in this tab only." }),
    input,
    el("button", { type: "submit", class: "main", text: "Go on" }),
  );
  banner.replaceChildren(form);
  banner.hidden = false;
  input.focus();
}

function tell(text) {
  done.textContent = text;
  done.classList.add("shown");
  clearTimeout(tell.timer);
  tell.timer = setTimeout(() => done.classList.remove("shown"), 6000);
}

function draw() {
  if (state === null) return;
  const troubles = troublesOf(state);
  document.title = `${troubles.some(({ level }) => level === "bad") ? "! " : ""}quiclb`;
  about.update(facts());
  drawVerdict(troubles);
  tiles.update(figures());
  const words = wanted.value.toLowerCase().split(/\s+/).filter(Boolean);
  const matches = (service) => (backend) => {
    const text = `${service.name} ${backend.name} ${backend.address} ${backend.state}`.toLowerCase();
    return words.every((word) => text.includes(word));
  };
  const all = sum(state.services.map((service) => service.backends.length));
  filter.hidden = all < 2;
  const shown = words.length ? state.services.filter((one) => one.backends.some(matches(one))) : state.services;
  const n = sum(shown.map((one) => one.backends.filter(matches(one)).length));
  write(found, words.length ? `${several(n, "match", "matches")} of ${count(all)}` : "");
  services.update(shown, { state, histories: history?.services ?? {}, slots, matches });
  offerServices(state.services);
}

// At first.
function opens(service) {
  const isWell = service.backends.every((backend) => ["active", "draining"].includes(backend.state));
  return state.services.length <= MANY_SERVICES || !isWell;
}

// What is not as it should be, the worst first: sentences, with `level` bad or note.
function troublesOf({ reload, services: all, flows, sockets, xdp, ...rest }) {
  const said = [];
  const say = (level, text) => said.push({ level, text });
  for (const service of all) {
    const by = (name) => service.backends.filter((backend) => backend.state === name).map((backend) => backend.name);
    if (by("active").length === 0) say("bad", `${service.name}: no backend is active.`);
    if (service["fail-open"]) {
      say("bad", `${service.name}: so many health checks fail that they are not believed (fail-open).`);
    }
    for (const [name, level] of [["dead", "bad"], ["down", "bad"], ["fenced", "note"], ["draining", "note"]]) {
      const those = by(name);
      if (those.length) say(level, `${service.name}: ${listed(those)} ${those.length === 1 ? "is" : "are"} ${name}.`);
    }
  }
  if (reload.errors.length) say("bad", "The latest reload was refused; what was before is in force.");
  for (const [name, used, most] of [
    ["flow table", flows, rest["flow-limit"]],
    ["table of sockets", sockets, rest["socket-limit"]],
  ]) {
    if (most > 0 && used >= NEARLY * most) say("bad", `The ${name} is nearly full: ${count(used)} of ${count(most)}.`);
  }
  if (xdp?.mode === "generic") say("note", `XDP runs in generic mode on ${xdp.interface}, which is slow.`);
  return said.sort((a, b) => (a.level === "note") - (b.level === "note"));
}

function listed(names) {
  const few = names.slice(0, 3).join(", ");
  return names.length > 3 ? `${few} and ${count(names.length - 3)} more` : few;
}

function drawVerdict(troubles) {
  const level = troubles.some((one) => one.level === "bad") ? "bad" : troubles.length ? "note" : "well";
  const backends = sum(state.services.map((service) => service.backends.length));
  const well = { level, text: `All is well: ${several(backends, "backend")}, all of them active.` };
  const said = troubles.length ? troubles : [well];
  const node = byId("verdict");
  mark(node, "data-level", level);
  const errors = state.reload.errors;
  const drawn = JSON.stringify([said, errors]);
  if (node.dataset.drawn === drawn) return;
  node.dataset.drawn = drawn;
  const most = 6;
  node.replaceChildren(...said.slice(0, most).map((one) => el("p", { text: one.text, "data-level": one.level })));
  if (said.length > most) node.append(el("p", { text: `And ${count(said.length - most)} more.` }));
  if (errors.length) {
    const list = el("ul", {});
    list.append(...errors.map((text) => el("li", {}, el("code", { text }))));
    node.append(el("details", { open: true }, el("summary", { text: several(errors.length, "mistake") }), list));
  }
}

function facts() {
  const { version, engine, workers, xdp, generation, now, reload } = state;
  const up = now - state["started-at"];
  const onInterface = xdp && `xdp on ${xdp.interface}, ${xdp.mode}, ${xdp.forward}`;
  const read = `configuration read ${ago(now - reload.at, 1)}`;
  return [
    { key: "version", text: `version ${version}` },
    { key: "engine", text: onInterface ?? `${engine}, ${several(workers, "worker")}` },
    { key: "uptime", text: `up ${time(up, up < 3600 ? 1 : 2)}` },
    { key: "generation", text: `generation ${generation}`, title: "Every change makes another one." },
    {
      key: "reload",
      text: reload.errors.length ? "latest reload refused" : read,
      level: reload.errors.length ? "bad" : null,
      title: `${read}; reloads: ${count(reload.taken)} taken, ${count(reload.refused)} refused`,
    },
  ];
}

class Fact {
  constructor() {
    this.node = el("li", {});
  }

  update({ text, level = null, title = null }) {
    write(this.node, text);
    mark(this.node, "data-level", level);
    mark(this.node, "title", title);
  }
}

function figures() {
  const total = (of) => sum(state.services.map(of));
  const known = Object.values(history?.services ?? {});
  const perSecond = sum(known.flatMap(({ verdicts }) => Object.values(verdicts).map(lately)));
  const unsent = Object.entries(state["send-failures"]).filter(([, n]) => n > 0);
  const [answered, pushed] = ["answered", "pushed"].map((how) => total(({ resets }) => resets[how]));
  const lost = sum(unsent.map(([, n]) => n));
  const all = [
    { name: "packets per second", value: rate(perSecond), note: "from clients, all services" },
    {
      name: "flows",
      value: count(state.flows),
      of: state.flows / state["flow-limit"],
      note: limit(state["flow-limit"]),
    },
    {
      name: "sockets to backends",
      needs: state["socket-limit"] > 0, // the xdp engine has none
      value: count(state.sockets),
      of: state.sockets / state["socket-limit"],
      note: limit(state["socket-limit"]),
    },
    {
      name: "connections that a 4-tuple balancer would have broken",
      value: count(total((service) => service.rescued)),
      note: `of ${several(total((service) => service.moves), "move")}`,
      is: "rescued",
    },
    {
      name: "stateless resets",
      value: count(answered + pushed),
      note: `${count(answered)} answered, ${count(pushed)} pushed`,
    },
    {
      name: "could not be sent",
      value: count(lost),
      note: unsent.map(([reason, n]) => `${reason} ${count(n)}`).join(", ") || "nothing was lost here",
    },
  ];
  return all.filter(({ needs = true }) => needs);
}

const limit = (n) => (n > 0 ? `of ${count(n)}` : "no limit");

class Tile {
  constructor() {
    this.value = el("strong", {});
    this.name = el("span", {});
    this.note = el("small", {});
    this.fill = el("span", { class: "fill" });
    this.bar = el("span", { class: "bar", hidden: true }, this.fill);
    this.node = el("li", {}, this.value, this.name, this.bar, this.note);
  }

  update({ name, value, note, of, is = null }) {
    write(this.value, value);
    write(this.name, name);
    write(this.note, note);
    mark(this.node, "data-is", is);
    this.bar.hidden = !Number.isFinite(of);
    this.fill.style.width = `${Math.min(100, (of || 0) * 100)}%`;
    mark(this.bar, "data-level", of >= NEARLY ? "bad" : null);
  }
}

look();
