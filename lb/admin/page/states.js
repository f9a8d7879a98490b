// What there is a colour, a shape and a word for: states of backends, verdicts, phases of config IDs.

import { svg } from "./dom.js";

// Worst first. `path` is drawn in a square of 12.
export const STATES = {
  dead: { says: "declared dead: its connections are reset", path: "M2 2L10 10M10 2L2 10" },
  fenced: { says: "declared dead by the operator", path: "M6 1A5 5 0 1 1 5.99 1M2.5 9.5L9.5 2.5" },
  down: { says: "its health checks fail", path: "M1 2.5H11L6 11Z", filled: true },
  draining: {
    says: "no new connections; it keeps those it has",
    path: "M6 0.5A5.5 5.5 0 1 1 5.99 0.5ZM6 2A4 4 0 0 0 6 10Z",
    filled: true,
  },
  active: { says: "takes new connections", path: "M6 0.5A5.5 5.5 0 1 1 5.99 0.5Z", filled: true },
};
export const WORST_FIRST = Object.keys(STATES);

export function badge() {
  const path = svg("path", {});
  const node = svg("svg", { viewBox: "0 0 12 12", class: "shape", "aria-hidden": "true" }, path);
  return {
    node,
    update(state) {
      if (node.dataset.state === state) return;
      node.dataset.state = state;
      path.setAttribute("d", STATES[state]?.path ?? "");
      path.classList.toggle("filled", Boolean(STATES[state]?.filled));
    },
  };
}

// What becomes of datagrams from clients, in the bands of the chart, from the bottom.
export const BANDS = [
  { key: "cid", name: "by connection ID", verdicts: ["cid"] },
  { key: "table", name: "by what was seen before", verdicts: ["table_scid", "table_dcid", "table_flow"] },
  { key: "ring", name: "new, by the ring", verdicts: ["fallback"] },
  { key: "down", name: "to a server that is down", verdicts: ["cid_down"] },
  { key: "reset", name: "answered with a reset", verdicts: ["reset"] },
  {
    key: "dropped",
    name: "dropped",
    verdicts: [
      "empty", "malformed", "unknown_server", "no_backend", "new_flow_limit", "reset_too_small", "reset_limited",
      "fragment",
    ],
  },
];

// In the order in which a config ID goes through them.
export const PHASES = {
  free: "nobody uses it",
  prepared: "balancers decode it",
  active: "servers issue it",
  retiring: "it ends when no packet carries it any more",
};
export const CONFIG_IDS = [0, 1, 2, 3, 4, 5, 6];
