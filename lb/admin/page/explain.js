// The box into which one pastes a connection ID or a packet.

import { explain } from "./api.js";
import { reasons } from "./dialog.js";
import { el, mark } from "./dom.js";
import { badge } from "./states.js";
import { several } from "./words.js";

const MAX_CID = 20; // octets
const OF_FLOW = ["fallback", "table_flow", "table_scid"]; // verdicts that depend on addresses

const byId = (id) => document.getElementById(id);
const [hex, kind, asked, client, explained] = ["hex", "kind", "asked", "client", "explained"].map(byId);

export function offerServices(services) {
  const names = ["", ...services.map((service) => service.name)];
  if (names.length === asked.options.length && names.every((name, i) => asked.options[i].value === name)) return;
  const chosen = asked.value;
  asked.replaceChildren(...names.map((name) => el("option", { value: name, text: name || "any service" })));
  asked.value = names.includes(chosen) ? chosen : "";
}

byId("explain").addEventListener("submit", async (event) => {
  event.preventDefault();
  mark(explained, "aria-busy", "true");
  try {
    explained.replaceChildren(...shown(await explain(question())));
  } catch (error) {
    explained.replaceChildren(el("div", { class: "refused", role: "alert" }, ...reasons(error)));
  }
  mark(explained, "aria-busy", null);
});

function question() {
  const digits = hex.value.replace(/[\s:]/g, "").replace(/^0x/i, "");
  const is = kind.value || (digits.length <= 2 * MAX_CID ? "cid" : "datagram");
  const given = { [is]: hex.value };
  if (asked.value) given.service = asked.value;
  if (client.value.trim()) given.client = client.value.trim();
  return given;
}

function shown(answer) {
  const facts = el("dl", { class: "facts" });
  const fact = (name, value) => facts.append(el("div", {}, el("dt", { text: name }), el("dd", { text: value })));
  if (answer.octets !== undefined) fact("packet", several(answer.octets, "octet"));
  if (answer.header !== undefined) fact("header", answer.header);
  if (answer.version !== undefined) fact("version", `0x${answer.version}`);
  if (answer.scid !== undefined) fact("source CID", answer.scid || "none");
  const configId = answer["config-id"];
  if (configId !== undefined) fact("config ID", configId === 7 ? "7, of no configuration" : (configId ?? "none"));
  const cards = el("ul", { class: "answers" });
  cards.append(...answer.services.map((service) => card(service, service.cid ?? answer.cid)));
  return [facts, answer.services.length ? cards : el("p", { text: "No service listens there." })];
}

function card(service, cid) {
  const goes = el("p", { class: "goes" });
  if (service.backend !== undefined) {
    const shape = badge();
    shape.update(service.state);
    goes.append(
      el("strong", { text: service.backend }),
      el("span", { text: service.address ?? "" }),
      el("span", { class: "state", "data-state": service.state }, shape.node, service.state),
    );
  } else {
    goes.append(el("strong", { text: OF_FLOW.includes(service.verdict) ? "some backend" : "nobody" }));
  }
  const why = service.why.charAt(0).toUpperCase() + service.why.slice(1);
  const node = el(
    "li",
    { class: "answer" },
    el(
      "h3",
      {},
      el("span", { text: service.service }),
      el("code", { text: service.verdict }),
      service.unroutable ? el("code", { text: service.unroutable }) : null,
    ),
    goes,
    el("p", { text: `${why}.` }),
    service["issued-by"] ? el("p", { text: `Its server ID is that of ${service["issued-by"]}.` }) : null,
  );
  if (cid) node.append(octets(cid, service));
  return node;
}

// The connection ID: its first octet, what carries server ID and nonce, and what is left over.
function octets(cid, service) {
  const length = service["server-id"] === undefined ? 0 : (service["server-id"].length + service.nonce.length) / 2;
  const parts = [["first", cid.slice(0, 2), "config ID"]];
  const isPlain = service.algorithm === "plaintext";
  if (length && isPlain) {
    const end = 2 + service["server-id"].length;
    parts.push(["server", cid.slice(2, end), "server ID"], ["nonce", cid.slice(end, 2 + 2 * length), "nonce"]);
  } else if (length) {
    parts.push(["block", cid.slice(2, 2 + 2 * length), `encrypted, ${service.algorithm}`]);
  }
  parts.push(["rest", cid.slice(2 + 2 * length), length ? "not looked at" : "not decoded"]);
  const line = (all) => {
    const node = el("div", { class: "octets" });
    for (const [of, digits, says] of all.filter(([, octets]) => octets)) {
      const code = el("code", { text: digits.replace(/..(?=.)/g, "$& ") });
      node.append(el("span", { "data-of": of }, code, el("small", { text: says })));
    }
    return node;
  };
  const node = el("div", { class: "cid" }, line(parts));
  if (length && !isPlain) {
    node.append(line([["server", service["server-id"], "server ID"], ["nonce", service.nonce, "nonce"]]));
  }
  return node;
}
