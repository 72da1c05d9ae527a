/* What the user does. */

function submit(text) {
  if (runs.has(current.id)) return;
  if (runCommand(text)) return clearInput();
  text = text.trim();
  if (!text) return;
  const kind = modelKind();
  if (current.messages.length && current.kind !== kind) openChat(newChat()); // the server has another kind of model now
  current.kind = kind;
  if (!current.title) current.title = text.split("\n")[0].slice(0, 60);
  current.updated = Date.now();
  chats.set(current.id, current);
  const message = { role: "user", content: text };
  current.messages.push(message);
  addTurn(current, message);
  if (before(current, message)) refreshTurn(current, before(current, message)); // offers no way out any longer
  clearInput();
  generate(current);
  scrollToEnd();
}

function clearInput() {
  $("input").value = "";
  fitInput();
}

function fitInput() {
  const input = $("input");
  input.style.height = "auto";
  input.style.height = `${Math.min(input.scrollHeight, 200)}px`;
  renderState();
}

/** Cuts a chat off at a message, runs `change`, and offers to bring back what was there. The texts on a base model's
 *  page have nothing to do with each other: there, only the one answer goes. */
function cutOff(chat, from, words, change) {
  const old = structuredClone(chat.messages);
  for (const message of chat.messages.splice(from, chat.kind === "text" ? 1 : Infinity)) {
    const view = views.get(message);
    if (chat.kind === "text" && message.role === "assistant") {
      view?.body.remove();
      view?.foot.remove();
    } else view?.article.remove();
  }
  change();
  const hadMore = old.length > from;
  if (hadMore)
    toast(words, "Undo", () => {
      runs.get(chat.id)?.stop("stopped");
      chat.messages = old;
      save(chat);
      openChat(chat);
    });
}

function regenerate(chat, message) {
  if (runs.has(chat.id)) return;
  const index = chat.messages.indexOf(message);
  const words =
    index === chat.messages.length - 1 || chat.kind === "text"
      ? "Asked again."
      : "Asked again; the turns after it are gone.";
  cutOff(chat, index, words, () => generate(chat, index));
  $("input").focus();
}

function editTurn(chat, message) {
  if (runs.has(chat.id)) return;
  const { article } = views.get(message);
  const hidden = [...article.children];
  const area = h("textarea", { "aria-label": "Edit message" });
  const close = () => {
    form.remove();
    for (const element of hidden) element.hidden = false;
  };
  const send = () => {
    const text = area.value.trim();
    if (!text || runs.has(chat.id)) return;
    close();
    const index = chat.messages.indexOf(message) + 1;
    cutOff(chat, index, chat.kind === "text" ? "Sent again." : "Sent again; the turns after it are gone.", () => {
      message.content = text;
      if (!chat.named && chat.messages[0] === message) chat.title = text.split("\n")[0].slice(0, 60);
      chat.updated = Date.now();
      refreshTurn(chat, message);
      generate(chat, index);
    });
    $("input").focus();
    scrollToEnd();
  };
  const cancel = () => {
    close();
    [...article.querySelectorAll('[aria-label^="Edit"]')].at(-1).focus();
  };
  const form = h(
    "form",
    {
      class: "edit",
      submit: (event) => {
        event.preventDefault();
        send();
      },
    },
    area,
    h(
      "div",
      {},
      h("button", { type: "button", class: "line-button", click: cancel }, "Cancel"),
      h("button", { type: "submit", class: "strong-button" }, "Send"),
    ),
  );
  area.value = message.content;
  area.addEventListener("keydown", (event) => {
    if (event.isComposing) return;
    if (event.key === "Escape") {
      event.stopPropagation();
      cancel();
    }
    if (event.key === "Enter" && !event.shiftKey) {
      event.preventDefault();
      send();
    }
  });
  for (const element of hidden) element.hidden = true;
  article.append(form);
  area.focus();
  area.setSelectionRange(area.value.length, area.value.length);
}

function stop() {
  runs.get(current.id)?.stop("stopped");
  $("input").focus();
}
