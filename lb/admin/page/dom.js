// Elements. Whatever comes from the balancer gets in as text, never as markup.

const SVG = "http://www.w3.org/2000/svg";

// An element with attributes and children. `text` is its text, `on...` are listeners; null and false are left out.
export function el(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

export function svg(tag, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "text") node.textContent = value;
    else if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

// What has not changed is not touched: selections and screen readers would notice.
export function write(node, text) {
  if (node.textContent !== String(text)) node.textContent = text;
}

export function mark(node, name, value) {
  if (value === null || value === false) node.removeAttribute(name);
  else if (node.getAttribute(name) !== String(value)) node.setAttribute(name, value);
}

// Keeps the parts of `parent` in step with `items`: one part each, made once by `make(item)`, in their order.
// A part has a `node`, and `update(item, ...more)`.
export class Parts {
  constructor(parent, keyOf, make) {
    this.parent = parent;
    this.keyOf = keyOf;
    this.make = make;
    this.known = new Map();
  }

  update(items, ...more) {
    const before = this.known;
    this.known = new Map();
    let place = this.parent.firstElementChild;
    for (const item of items) {
      const key = this.keyOf(item);
      const part = before.get(key) ?? this.make(item);
      before.delete(key);
      this.known.set(key, part);
      if (part.node === place) place = place.nextElementSibling;
      else this.parent.insertBefore(part.node, place);
      part.update(item, ...more);
    }
    for (const gone of before.values()) gone.node.remove();
  }
}
