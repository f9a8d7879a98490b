// What an operator may do to a backend, each behind a question that says what will happen.

import { changeBackend } from "./api.js";
import { ask } from "./dialog.js";
import { el } from "./dom.js";
import { count, percent, rate, several } from "./words.js";

const LASTS = "This is stronger than the configuration file, and stays over reloads and restarts until it is undone.";
const MAX_WEIGHT = 1000;

const traffic = ({ flows, "packets-per-second": packets }) =>
  `${several(flows, "flow")}, ${rate(packets)} packets per second now`;

// `told(text)` is called once a change was made. Each takes the state as it was when the button was pressed.
export class Changes {
  constructor(told) {
    this.told = told;
  }

  drain(state, service, backend) {
    const others = service.backends.filter((other) => other.state === "active" && other.name !== backend.name);
    const elsewhere = others.length
      ? `Its ${percent(backend["ring-share"])} of them go to the others.`
      : `No other backend of ${service.name} is active: they will have nowhere to go.`;
    this.ask(state, service, backend, {
      title: `Drain ${backend.name}?`,
      lines: [
        `It gets no new connections any more. ${elsewhere}`,
        `Those that it has stay where they are: ${traffic(backend)}.`,
        LASTS,
      ],
      does: "Drain",
      isGrave: others.length === 0,
      change: { drain: true },
      done: `${backend.name} is draining.`,
    });
  }

  undrain(state, service, backend) {
    const isFile = !backend.overridden.includes("drain");
    this.ask(state, service, backend, {
      title: `Give ${backend.name} new connections again?`,
      lines: [
        "It gets its share of new connections, unless its health checks fail; with a slow start, by and by.",
        isFile ? `The configuration file says that it drains. ${LASTS}` : null,
      ],
      does: "Undrain",
      change: { drain: false },
      done: `${backend.name} is not draining any more.`,
    });
  }

  fence(state, service, backend) {
    this.ask(state, service, backend, {
      title: `Fence ${backend.name}?`,
      lines: [
        "It is declared dead, whatever its health checks say, and gets no packets any more.",
        `Its connections are lost: ${traffic(backend)}.`,
        "Where there is a reset key, clients are told at once, by a stateless reset.",
        LASTS,
      ],
      does: "Fence",
      isGrave: true,
      change: { fence: true },
      done: `${backend.name} is fenced.`,
    });
  }

  unfence(state, service, backend) {
    this.ask(state, service, backend, {
      title: `Take the fence of ${backend.name} back?`,
      lines: ["Its health checks are believed again."],
      does: "Unfence",
      change: { fence: false },
      done: `${backend.name} is not fenced any more.`,
    });
  }

  weigh(state, service, backend) {
    const input = el("input", {
      id: "weight", type: "number", min: "0", max: String(MAX_WEIGHT), step: "1", required: true, inputmode: "numeric",
      value: String(backend.weight),
    });
    const change = {};
    this.ask(state, service, backend, {
      title: `Change the weight of ${backend.name}?`,
      lines: [
        "Its share of new connections, relative to the others; 0 is none. Connections that there are stay.",
        LASTS,
      ],
      field: el("p", { class: "field" }, el("label", { for: "weight", text: `Weight, 0 to ${MAX_WEIGHT}` }), input),
      does: "Change",
      change,
      before: () => { change.weight = input.valueAsNumber; },
      done: () => `${backend.name} has weight ${count(change.weight)}.`,
    });
  }

  asInFile(state, service, backend) {
    this.ask(state, service, backend, {
      title: `Take back what was said about ${backend.name}?`,
      lines: [
        `Its ${backend.overridden.join(", ")} will be what the configuration file says, and its health checks decide.`,
      ],
      does: "As in the file",
      change: { drain: null, weight: null, fence: false },
      done: `${backend.name} is what the file says.`,
    });
  }

  ask(state, service, backend, { change, done, before, ...question }) {
    question.lines = [`Service ${service.name}, ${backend.address}.`, ...question.lines];
    question.act = async () => {
      before?.();
      await changeBackend(service.name, backend.name, change, state.generation);
      this.told(typeof done === "function" ? done() : done);
    };
    ask(question);
  }
}
