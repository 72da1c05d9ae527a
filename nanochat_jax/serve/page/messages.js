/* Messages on the screen. */

/** What an answer's content consists of: {kind: "text", text} and {kind: "tool", expression, result}. */
function piecesOf(content) {
  const pieces = [];
  for (const part of typeof content === "string" ? [{ type: "text", text: content }] : content) {
    const last = pieces.at(-1);
    if (part.type === "python") pieces.push({ kind: "tool", expression: part.text });
    else if (part.type === "python_output" && last?.kind === "tool" && last.result === undefined)
      last.result = part.text;
    else if (part.type === "python_output") pieces.push({ kind: "tool", expression: "", result: part.text });
    else if (part.text) pieces.push({ kind: "text", text: part.text });
  }
  return pieces;
}

const textOf = (message) =>
  piecesOf(message.content)
    .filter((piece) => piece.kind === "text")
    .map((piece) => piece.text)
    .join("");

function appendPart(message, type, text) {
  if (type === "text" && typeof message.content === "string") {
    message.content += text;
    return;
  }
  if (typeof message.content === "string")
    message.content = message.content ? [{ type: "text", text: message.content }] : [];
  const last = message.content.at(-1);
  if (type === "text" && last?.type === type) last.text += text;
  else message.content.push({ type, text });
}

function toolElement() {
  const shown = h("code");
  const list = h("dl");
  const element = h(
    "details",
    { class: "tool" },
    h("summary", {}, icon("calculator"), h("span", {}, "Calculator"), shown),
    list,
  );
  element.update = ({ expression, result }) => {
    shown.textContent = result === undefined ? expression : `${expression} = ${result}`;
    list.replaceChildren(
      h("dt", {}, "Asked"),
      h("dd", {}, expression),
      h("dt", {}, "Result"),
      h("dd", {}, result ?? "none"),
    );
  };
  return element;
}

/** Shows pieces in a container, keeping the elements that are there: an opened tool block stays open. */
function renderPieces(container, pieces) {
  pieces.forEach((piece, index) => {
    let element = container.children[index];
    if (!element || element.matches(".tool") !== (piece.kind === "tool")) {
      const fresh = piece.kind === "tool" ? toolElement() : h("div", { class: "prose" });
      if (element) element.replaceWith(fresh);
      else container.append(fresh);
      element = fresh;
    }
    if (piece.kind === "tool") element.update(piece);
    else renderMarkdown(element, piece.text);
  });
  while (container.children.length > pieces.length) container.lastChild.remove();
}

const views = new WeakMap(); // message -> {article, body, foot, edit}

function addTurn(chat, message) {
  $("empty")?.remove();
  const body = h("div", { class: "body" });
  const foot = h("div");
  const passage = chat.kind === "text";
  let article = passage && message.role === "assistant" && views.get(before(chat, message))?.article;
  if (article) {
    article.append(foot);
    views.get(before(chat, message)).body.append(h("span", { class: "made" }));
  } else {
    article = h(
      "article",
      { class: `turn ${passage ? "passage" : message.role}`, "aria-label": message.role === "user" ? "You" : "Answer" },
      body,
      foot,
    );
    $("log").append(article);
  }
  views.set(message, {
    article,
    body: passage && message.role === "assistant" ? (article.querySelector(".made") ?? body) : body,
    foot,
  });
  refreshTurn(chat, message);
}

const before = (chat, message) => chat.messages[chat.messages.indexOf(message) - 1];

/** Brings a message's elements up to date with the message. */
function refreshTurn(chat, message) {
  const view = views.get(message);
  if (!view || chat !== current || !chat.messages.includes(message)) return; // not on the screen, or undone
  const stick = atEnd();
  if (message.role === "user") refreshQuestion(chat, message, view);
  else refreshAnswer(chat, message, view);
  if (stick) scrollToEnd();
}

function refreshQuestion(chat, message, { body, foot }) {
  if (chat.kind === "text") {
    const given = body.querySelector(".given") ?? body.appendChild(h("span", { class: "given" }));
    given.textContent = message.content;
  } else body.textContent = message.content;
  const copyButton = iconButton("copy", "Copy message", () => copy(message.content, copyButton));
  foot.className = "row";
  foot.replaceChildren(
    h(
      "span",
      { class: "actions" },
      copyButton,
      iconButton("edit", "Edit and send again", () => editTurn(chat, message)),
    ),
  );
}

function refreshAnswer(chat, message, { body, foot }) {
  const running = runs.get(chat.id)?.message === message;
  const pieces = piecesOf(message.content);
  if (chat.kind === "text") body.textContent = textOf(message);
  else if (running && !pieces.length)
    body.replaceChildren(
      h("span", { class: "dots", "aria-label": "The answer is on its way" }, h("i"), h("i"), h("i")),
    );
  else {
    body.querySelector(":scope > .dots")?.remove();
    renderPieces(body, pieces);
  }
  foot.replaceChildren();
  if (running) {
    const { waiting } = runs.get(chat.id);
    if (waiting) foot.append(h("div", { class: "note" }, waiting));
    return;
  }
  const note = noteOn(chat, message);
  if (note) foot.append(note);
  if (known.has(message)) foot.append(tokenView(message));
  const whole = (chat.kind === "text" ? before(chat, message).content : "") + textOf(message);
  const copyButton = iconButton("copy", "Copy answer", () => copy(whole, copyButton));
  const actions = h(
    "span",
    { class: "actions" },
    whole ? copyButton : null,
    iconButton("again", "Regenerate", () => regenerate(chat, message)),
  );
  if (chat.kind === "text") {
    actions.append(
      iconButton("on", "Continue the text", () => generate(chat, 0, message)),
      iconButton("edit", "Edit and send again", () => editTurn(chat, before(chat, message))),
    );
  }
  const stats = [];
  if (message.completion_tokens) stats.push(plural(message.completion_tokens, "token"));
  if (message.rate) stats.push(`${message.rate.toFixed(1)} tokens/s`);
  const wait = message.wait && `First token after ${message.wait.toFixed(2)} s`;
  foot.append(
    h(
      "div",
      { class: "row" },
      stats.length ? h("span", { class: "stats", title: wait }, stats.join(" · ")) : null,
      actions,
    ),
  );
}

/** Why an answer is not whole, and what can be done about it. */
function noteOn(chat, message) {
  const isLast = chat.messages.at(-1) === message;
  const offer = (label, act) =>
    isLast ? h("button", { type: "button", class: "line-button", click: act }, label) : "";
  const again = () => offer("Try again", () => regenerate(chat, message));
  switch (message.end) {
    case "stop":
      return null;
    case "length": {
      const full = message.prompt_tokens + message.completion_tokens >= (link.model?.context_length ?? Infinity);
      return h(
        "div",
        { class: "note" },
        full
          ? "The context is full: the answer ends here."
          : "The answer reached the longest length, which the settings can change.",
      );
    }
    case "stopped":
      return h("div", { class: "note" }, "Stopped.");
    case "error":
      if (message.code === "context_length_exceeded") {
        const shorten = () => {
          choose("shorten", true);
          regenerate(chat, message);
        };
        return h("div", { class: "note bad" }, message.problem, offer("Leave out the oldest turns", shorten));
      }
      return h("div", { class: "note bad" }, message.problem, again());
    default:
      return h(
        "div",
        { class: "note bad" },
        message.problem ?? "The page was closed before this answer was complete.",
        again(),
      );
  }
}

const scroller = $("scroll");
const narrow = matchMedia("(max-width: 52rem)"); // the sidebar covers the page there
const touch = matchMedia("(hover: none)");
const atEnd = () => scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < 48;

function scrollToEnd() {
  scroller.scrollTop = scroller.scrollHeight;
  $("to-end").hidden = true;
}

/** Shows another chat. Screen readers are not read the whole of it. */
function openChat(chat, { focus = true } = {}) {
  current = chat;
  try {
    sessionStorage.setItem(CURRENT_KEY, chat.id);
  } catch {
    /* only a convenience */
  }
  const log = $("log");
  log.setAttribute("aria-live", "off");
  log.replaceChildren();
  for (const message of chat.messages) addTurn(chat, message);
  if (!chat.messages.length) showEmpty();
  scrollToEnd();
  requestAnimationFrame(() => requestAnimationFrame(() => log.setAttribute("aria-live", "polite")));
  renderChats();
  renderState();
  if (narrow.matches) showSidebar(false);
  if (focus && !touch.matches) $("input").focus(); // there it would bring up the keyboard
}

const EXAMPLES = {
  chat: [
    "Who are you?",
    "What is 34 + 27?",
    'Spell the word "garden".',
    'How many times does the letter "r" occur in "strawberry"?',
  ],
  text: ["Once upon a time", "The capital of France is", "The sea is", "Yesterday morning the old man"],
};

function showEmpty() {
  const kind = modelKind();
  const name = link.model?.id;
  const words =
    kind === "text"
      ? [
          name ? `${name} continues what you write` : "Write the start of a text",
          "This is a base model: it has read a lot and goes on with any text, but nobody has taught it to answer yet.",
        ]
      : [
          name ? `Talk to ${name}` : "Talk to your model",
          "A small language model, trained from raw text. It is often wrong. Chats are kept in this browser only.",
        ];
  const example = (text) => h("li", {}, h("button", { type: "button", click: () => submit(text) }, text));
  $("empty")?.remove();
  $("log").append(
    h(
      "section",
      { id: "empty" },
      h("h2", {}, words[0]),
      h("p", {}, words[1]),
      h("ul", { id: "examples", "aria-label": "Examples" }, ...EXAMPLES[kind].map(example)),
    ),
  );
}

/** Everything outside the messages that depends on the chat and on whether it is being answered. */
function renderState() {
  const running = runs.has(current.id);
  const title = titleOf(current);
  $("title").textContent = title;
  document.title = current.messages.length ? `${title} · nanochat` : "nanochat";
  $("send").hidden = running;
  $("send").disabled = !$("input").value.trim();
  $("stop").hidden = !running;
  $("log").setAttribute("aria-busy", String(running));
  $("input").placeholder = modelKind() === "text" ? "Write the start of a text" : "Ask anything";
  renderMeter();
}

function renderMeter() {
  const last = current.messages.findLast((message) => message.prompt_tokens);
  const context = link.model?.context_length;
  const used = last ? last.prompt_tokens + (last.completion_tokens ?? 0) : 0;
  const meter = $("meter");
  meter.hidden = !last && !context;
  meter.querySelector(".track").hidden = !context;
  meter.querySelector(".figures").textContent = context
    ? `${count(used)} of ${count(context)} tokens`
    : plural(used, "token");
  meter.querySelector(".fill").style.width = context ? `${Math.min(100, (100 * used) / context)}%` : "0";
  meter.classList.toggle("high", Boolean(context) && used > 0.85 * context);
  meter.setAttribute("aria-valuenow", used);
  meter.setAttribute("aria-valuemax", context ?? used);
  meter.setAttribute("aria-valuetext", context ? `${used} of ${context} tokens` : `${used} tokens`);
}
