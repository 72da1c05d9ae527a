/* Small tools. */

const $ = (id) => document.getElementById(id);

/** An element. A function among the attributes is a listener: h("button", {class: "x", click: f}, "text"). */
function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") element.addEventListener(name, value);
    else if (value !== false && value != null) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child != null));
  return element;
}

function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  svg.setAttribute("class", "icon");
  svg.setAttribute("aria-hidden", "true");
  use.setAttribute("href", `#icon-${name}`);
  svg.append(use);
  return svg;
}

const iconButton = (name, label, click) =>
  h("button", { type: "button", class: "icon-button", "aria-label": label, title: label, click }, icon(name));

const seconds = () => performance.now() / 1000;
const count = (n) => n.toLocaleString("en");
const plural = (n, noun) => `${count(n)} ${noun}${n === 1 ? "" : "s"}`;
const newId = () => Date.now().toString(36) + Math.random().toString(36).slice(2, 8);
const isObject = (value) => typeof value === "object" && value !== null && !Array.isArray(value);

/** Resolves after some seconds, rejects with the signal's reason as soon as it is aborted. */
function pause(duration, signal) {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, duration * 1000);
    signal?.addEventListener(
      "abort",
      () => {
        clearTimeout(timer);
        reject(signal.reason);
      },
      { once: true },
    );
  });
}

/** A short message at the bottom, with at most one thing to do about it. */
function toast(text, action, act) {
  clearTimeout(toast.timer);
  $("toast").replaceChildren(h("span", {}, text));
  if (action)
    $("toast").append(
      h(
        "button",
        {
          type: "button",
          click: () => {
            $("toast").replaceChildren();
            act();
          },
        },
        action,
      ),
    );
  toast.timer = setTimeout(() => $("toast").replaceChildren(), action ? 10000 : 5000);
}

/** For screen readers only. */
const announce = (text) => {
  $("announce").textContent = text;
};

/** Copies text; the second way is for pages that are served over plain HTTP to another machine. */
async function copy(text, button) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    const area = h("textarea", { class: "unseen" });
    area.value = text;
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  const before = [...button.childNodes];
  button.replaceChildren(...(button.matches(".icon-button") ? [icon("check")] : ["Copied"]));
  announce("Copied");
  button.focus();
  setTimeout(() => button.replaceChildren(...before), 1500);
}
