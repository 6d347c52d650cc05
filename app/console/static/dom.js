// Elements from plain values. Text always goes in as text: nothing here parses HTML.

export function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes ?? {})) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "vars") setVars(element, value);
    else if (name === "value") element.value = value;
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

export function setVars(element, vars) {
  for (const [name, value] of Object.entries(vars)) element.style.setProperty(`--${name}`, value);
}

// Changes the text only where it differs: four times a second, most of it doesn't.
export function setText(element, text) {
  const wanted = String(text);
  if (element.textContent !== wanted) element.textContent = wanted;
}

let lastId = 0;

export function field(label, control, hint) {
  control.id ||= `field-${++lastId}`;
  const note = hint ? h("small", { id: `${control.id}-hint` }, hint) : null;
  if (note) control.setAttribute("aria-describedby", note.id);
  return h("div", { class: "field" }, h("label", { for: control.id }, label), control, note);
}

export function options(values, selected) {
  return values.map(([value, label]) => {
    const option = h("option", { value }, label);
    option.selected = String(value) === String(selected);
    return option;
  });
}

export function copyButton(text, label = "Copy") {
  const button = h("button", { type: "button", class: "small" }, label);
  button.addEventListener("click", async () => {
    const copied = await copy(typeof text === "function" ? text() : text);
    button.textContent = copied ? "Copied" : "Select and copy manually";
    setTimeout(() => { button.textContent = label; }, 1600);
  });
  return button;
}

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {  // no permission, or plain http from another machine
    const area = h("textarea", { class: "off-screen", "aria-hidden": "true", value: text });
    document.body.append(area);
    area.select();
    const copied = document.execCommand("copy");
    area.remove();
    return copied;
  }
}

export function code(text) {
  return h("div", { class: "code" }, h("pre", { tabindex: "0", role: "region", "aria-label": "Code" }, text), copyButton(text));
}

export function problem(error, title = "The action failed") {
  const facts = [error.status, error.code].filter(Boolean).join(" · ");
  return h("div", { class: "notice bad", role: "alert" },
    h("strong", {}, title), facts ? h("small", {}, facts) : null, h("p", {}, error.message));
}

const whole = new Intl.NumberFormat("en");

export function number(value) {
  return whole.format(Math.round(value));
}

export function counted(count, noun) {
  return `${number(count)} ${noun}${count === 1 ? "" : "s"}`;
}

export function bytes(count) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let power = 0;
  while (count >= 1000 && power < units.length - 1) { count /= 1000; power += 1; }
  return `${count >= 100 || power === 0 ? Math.round(count) : count.toFixed(1)} ${units[power]}`;
}

export function milliseconds(value) {
  if (value === null || value === undefined) return "–";
  if (value >= 1000) return `${(value / 1000).toFixed(2)} s`;
  return value >= 100 ? `${Math.round(value)} ms` : `${Number(value.toFixed(1))} ms`;
}

export function percent(share) {
  return `${Number((100 * share).toFixed(1))}%`;
}
