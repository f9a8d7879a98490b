// Asks before anything is changed, and says why a change was refused.

import { el } from "./dom.js";

const dialog = document.getElementById("dialog");
let busy = false; // until it is known what became of a change, the question stays
dialog.addEventListener("cancel", (event) => busy && event.preventDefault());

// `lines` say what will happen. `field` is one more element, if something is to be told. `act` makes the change;
// the dialog stays, with the reason, if it throws.
export function ask({ title, lines, does, isGrave = false, field = null, act }) {
  const refused = el("div", { class: "refused", role: "alert" });
  const cancel = el("button", { type: "button", text: "Cancel", onclick: () => dialog.close() });
  const go = el("button", { type: "submit", class: isGrave ? "grave" : "main", text: does });
  const setBusy = (isBusy) => {
    busy = isBusy;
    go.disabled = cancel.disabled = isBusy;
  };
  setBusy(false);
  const form = el(
    "form",
    {
      onsubmit: async (event) => {
        event.preventDefault();
        setBusy(true);
        refused.replaceChildren();
        try {
          await act();
          dialog.close();
        } catch (error) {
          refused.replaceChildren(...reasons(error));
          setBusy(false);
        }
      },
    },
    el("h2", { id: "dialog-title", text: title }),
    ...lines.filter(Boolean).map((text) => el("p", { text })),
    field,
    refused,
    el("div", { class: "buttons" }, cancel, go),
  );
  dialog.replaceChildren(form);
  dialog.showModal();
  (field?.querySelector("input") ?? cancel).focus();
}

// What the balancer said, as elements.
export function reasons(error) {
  const shown = WORDS[error.status];
  const list = el("ul", {});
  list.append(...error.reasons.map((text) => el("li", { text })));
  return [
    el("p", { text: shown ?? error.message }),
    shown ? el("p", { class: "small", text: error.message }) : null,
    error.reasons.length ? list : null,
  ].filter(Boolean);
}

const WORDS = {
  0: "quiclb did not answer. It may have made the change all the same: look before you repeat it.",
  401: "quiclb wants a token that may change things.",
  403: "You may look, but not change anything.",
  412: "Somebody else changed something in the meantime. Look again, and repeat it if it is still right.",
};
