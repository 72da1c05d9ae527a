/* Sampling settings. */

const SETTINGS = {
  temperature: {
    label: "Temperature",
    name: "temperature",
    command: "temperature",
    initial: 0.8,
    min: 0,
    max: 2,
    range: "0.0 and 2.0",
    step: 0.05,
    help: "0 takes the most likely token every time; higher is more adventurous.",
  },
  top_k: {
    label: "Top-k",
    name: "top-k",
    command: "topk",
    initial: 50,
    min: 1,
    max: 200,
    step: 1,
    help: "Sample among the k most likely tokens.",
  },
  top_p: {
    label: "Top-p",
    name: "top-p",
    command: "topp",
    initial: 1,
    min: 0,
    max: 1,
    range: "0.0 and 1.0",
    step: 0.01,
    help: "Sample among the most likely tokens that together have this probability.",
  },
  max_tokens: {
    label: "Longest answer",
    name: "max tokens",
    command: "maxtokens",
    initial: 512,
    min: 1,
    max: 4096,
    step: 1,
    box: true,
    help: "In tokens.",
  },
  seed: {
    label: "Seed",
    name: "seed",
    command: "seed",
    initial: null,
    min: 0,
    max: 2147483647,
    step: 1,
    box: true,
    help: "The same seed and messages give the same answer. Empty: another one each time.",
  },
};

const SWITCHES = {
  shorten: "Leave out the oldest turns when the context is full",
  alternatives: "Show what else the model could have said",
};

let chosen = {}; // what the user has set; all else is the server's default or `initial`
const setting = (name) => (name in chosen ? chosen[name] : (link.model?.defaults?.[name] ?? SETTINGS[name].initial));

/** The value that a text stands for. Throws an Error with the reason if there is none. */
function parseSetting(name, text) {
  const { min, max, range, step, label, initial } = SETTINGS[name];
  text = text.trim();
  if (initial === null && ["", "none", "random"].includes(text)) return null;
  const value = /^[+-]?(\d+\.?\d*|\.\d+)$/.test(text) ? Number(text) : NaN;
  if (!(value >= min && value <= max) || (step === 1 && !Number.isInteger(value))) {
    throw new Error(
      `Invalid ${SETTINGS[name].name}. Must be ${step === 1 ? "a whole number " : ""}between ${range ?? `${min} and ${max}`}`,
    );
  }
  return value;
}

function choose(name, value) {
  chosen[name] = value;
  write(SETTINGS_KEY, chosen);
  renderSettings();
}

function loadSettings() {
  const kept = read(SETTINGS_KEY);
  chosen = {};
  if (!isObject(kept)) return;
  for (const name of Object.keys(SETTINGS)) {
    try {
      if (name in kept) chosen[name] = parseSetting(name, String(kept[name] ?? ""));
    } catch {
      /* of another version */
    }
  }
  for (const name of Object.keys(SWITCHES)) if (kept[name] === true) chosen[name] = true;
}

function buildSettings() {
  for (const [name, { label, min, max, step, box, help }] of Object.entries(SETTINGS)) {
    const id = `set-${name}`;
    const field = h("input", {
      id,
      type: "text",
      inputmode: "decimal",
      autocomplete: "off",
      "aria-describedby": `${id}-help`,
      placeholder: "random",
    });
    const slider = box ? null : h("input", { type: "range", min, max, step, "aria-label": `${label}, slider` });
    const wrong = h("p", { class: "wrong", role: "alert", hidden: true });
    const show = (error) => {
      field.setAttribute("aria-invalid", String(Boolean(error)));
      wrong.hidden = !error;
      wrong.textContent = error ? `${error.message}.` : "";
    };
    field.addEventListener("change", () => {
      try {
        choose(name, parseSetting(name, field.value));
        show();
      } catch (error) {
        show(error);
      }
    });
    slider?.addEventListener("input", () => {
      choose(name, Number(slider.value));
      show();
    });
    SETTINGS[name].refresh = () => {
      field.value = setting(name) ?? "";
      if (slider) slider.value = setting(name);
      show();
    };
    $("setting-list").append(
      h(
        "div",
        { class: "setting" },
        h("div", { class: "top" }, h("label", { for: id }, label), field),
        slider,
        h("p", { class: "help", id: `${id}-help` }, help),
        wrong,
      ),
    );
  }
  for (const [name, label] of Object.entries(SWITCHES)) {
    const id = `set-${name}`;
    const box = h("input", { type: "checkbox", id, change: () => choose(name, box.checked) });
    $("setting-list").append(
      h("div", { class: "setting" }, h("div", { class: "top" }, h("label", { for: id }, label), box)),
    );
  }
}

function renderSettings() {
  for (const { refresh } of Object.values(SETTINGS)) refresh();
  for (const name of Object.keys(SWITCHES)) $(`set-${name}`).checked = chosen[name] === true;
}
