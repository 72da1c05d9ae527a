/* The server. */

/** What the server says is wrong, as a sentence; code: its word for programs. */
class ServerError extends Error {
  constructor(message, code) {
    super(message[0].toUpperCase() + message.slice(1) + (/[.!?]$/.test(message) ? "" : "."));
    this.code = code;
  }
}
class KeyRefused extends ServerError {
  constructor() {
    super("The server needs an API key.", "key");
  }
}

/** How things stand with the server. state: "connecting" | "ready" | "warming" (it compiles its programs, and answers
 *  when it has) | "down" | "key" (it wants one and got none).
 *  model: {id, stage, step, chat, context_length, defaults} of /v1/models. */
const link = { state: "connecting", model: null, failures: 0, timer: 0, nextTry: 0 };
const RETRIES = [1, 2, 4, 8, 15]; // seconds
const POLL = 10; // seconds between looks at a server that is well
const modelKind = () => (link.model && !link.model.chat ? "text" : "chat");

let apiKey = null;
try {
  apiKey = sessionStorage.getItem(API_KEY);
} catch {
  /* asked for again after a reload */
}

/** fetch with the key; asks the user for one where the server does not accept it. Other failures are the caller's. */
async function request(path, options = {}) {
  for (;;) {
    const sent = apiKey;
    const headers = { ...options.headers, ...(sent ? { Authorization: `Bearer ${sent}` } : {}) };
    const response = await fetch(path, { cache: "no-store", ...options, headers });
    if (response.status !== 401) return response;
    if (sent === apiKey) await askKey(Boolean(sent)); // else another request has got a new one meanwhile
  }
}

/** Resolves when a key was entered, throws KeyRefused when the dialog was closed. One dialog, however many ask. */
function askKey(wrong) {
  if (askKey.pending) return askKey.pending;
  const dialog = $("key-dialog");
  $("key-wrong").hidden = !wrong;
  $("key").value = "";
  dialog.showModal();
  askKey.pending = new Promise((resolve, reject) => {
    dialog.addEventListener(
      "close",
      () => {
        askKey.pending = null;
        if (dialog.returnValue !== "entered") return reject(new KeyRefused());
        apiKey = $("key").value.trim();
        $("key").value = "";
        try {
          sessionStorage.setItem(API_KEY, apiKey);
        } catch {
          /* kept in memory */
        }
        resolve();
      },
      { once: true },
    );
  });
  return askKey.pending;
}

/** A sentence about an answer that is no success, from the OpenAI form of errors or FastAPI's. */
async function serverError(response) {
  let data = {};
  try {
    data = await response.json();
  } catch {
    /* a proxy's page, perhaps */
  }
  const detail = typeof data.detail === "string" ? data.detail : data.detail?.[0]?.msg;
  const message = data.error?.message ?? detail ?? `The server answered with error ${response.status}.`;
  return new ServerError(message || "The server reported an error.", data.error?.code);
}

async function loadModel() {
  const response = await request("v1/models");
  if (!response.ok) throw await serverError(response);
  link.model = (await response.json()).data[0];
  renderSettings();
}

/** Looks whether the server is there, learns which model it has, and comes back later: sooner when it is not well. */
async function checkServer() {
  clearTimeout(link.timer);
  let problem = null;
  let warmedUp = 1;
  const was = link.state;
  try {
    const response = await fetch("health", { cache: "no-store", signal: AbortSignal.timeout(5000) });
    const health = await response.json().catch(() => ({})); // a proxy's page, perhaps
    if (health.status === "warming up") {
      warmedUp = health.warmed_up;
      if (was !== "warming") await loadModel();
    } else if (!response.ok)
      problem =
        response.status === 503
          ? "The server is there, but its model is not working."
          : `The server answers with error ${response.status}.`;
    else {
      const { status, model, step } = health; // another model after a restart, or while it follows a run
      if (status !== "ok") problem = "The server has a problem; its log says more.";
      else if (was !== "ready" || model !== link.model.id || step !== link.model.step) await loadModel();
    }
  } catch (error) {
    if (error instanceof KeyRefused) return setLink("key", error.message);
    problem = error instanceof ServerError ? error.message : "The server does not answer.";
  }
  link.failures = problem ? link.failures + 1 : 0;
  setLink(problem ? "down" : warmedUp < 1 ? "warming" : "ready", problem, warmedUp);
  if (link.failures >= 2) for (const run of runs.values()) if (seconds() - run.heard > 10) run.stop("lost");
  const wait = warmedUp < 1 ? RETRIES[0] : problem ? RETRIES[Math.min(link.failures, RETRIES.length) - 1] : POLL;
  link.nextTry = seconds() + wait;
  link.timer = setTimeout(() => {
    if (document.visibilityState === "visible") checkServer();
  }, wait * 1000);
  renderCountdown();
}

function setLink(state, problem, warmedUp = 1) {
  const was = link.state;
  link.state = state;
  const { model } = link;
  $("model").dataset.state = state;
  $("model").title = state === "ready" ? `${model.stage}, step ${model.step}` : "";
  $("model").textContent =
    state === "ready"
      ? model.id + (model.chat ? "" : " · base model")
      : ({ key: "no key", warming: `warming up, ${Math.floor(100 * warmedUp)} %` }[state] ?? "not connected");
  const banner = $("banner");
  clearTimeout(banner.timer);
  if (state === "ready") {
    if (was === "down" && banner.dataset.problem) {
      banner.className = "good";
      banner.replaceChildren("The server is back.");
      banner.timer = setTimeout(() => {
        banner.hidden = true;
      }, 4000);
    } else banner.hidden = true;
    banner.dataset.problem = "";
    if (!current.messages.length && !document.querySelector(".console")) showEmpty();
  } else if (state === "warming") {
    banner.className = "good";
    banner.dataset.problem = "";
    if (was !== "warming") banner.replaceChildren("The server is warming up. What you ask now is answered when it is done.");
    banner.hidden = false;
    if (!current.messages.length && was !== "warming") showEmpty();
  } else if (banner.dataset.problem !== problem) {
    banner.className = "";
    banner.dataset.problem = problem;
    const act = state === "key" ? "Enter the key" : "Try now";
    banner.replaceChildren(
      h("span", {}, problem),
      h("span", { id: "countdown", "aria-hidden": "true" }),
      h("button", { type: "button", class: "line-button", click: checkServer }, act),
    );
    banner.hidden = false;
  }
  renderState();
}

function renderCountdown() {
  const field = $("countdown");
  if (!field || link.state !== "down") return;
  const left = Math.max(0, Math.ceil(link.nextTry - seconds()));
  field.textContent = left ? `Next try in ${left} s.` : "Trying.";
  if (left) setTimeout(renderCountdown, 500);
}
