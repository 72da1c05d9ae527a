/* The list of chats. */

const byDate = () => [...chats.values()].sort((a, b) => b.updated - a.updated);

function renderChats() {
  const list = $("chats");
  if (list.querySelector("input")) return; // a title is being typed
  const state = JSON.stringify(byDate().map((chat) => [chat.id, titleOf(chat), chat === current, runs.has(chat.id)]));
  if (list.state === state) return;
  list.state = state;
  const focused = list.contains(document.activeElement) && document.activeElement;
  const [focusId, focusClass] = focused ? [focused.closest("li").id, focused.dataset.what] : [];
  list.replaceChildren(
    ...byDate().map((chat) => {
      const title = titleOf(chat);
      const open = h(
        "button",
        { type: "button", class: "open", "data-what": "open", title, click: () => openChat(chat) },
        title,
      );
      if (chat === current) open.setAttribute("aria-current", "true");
      const rename = iconButton("edit", `Rename ${title}`, () => renameChat(chat));
      const remove = iconButton("delete", `Delete ${title}`, () => deleteChat(chat));
      rename.dataset.what = "rename";
      remove.dataset.what = "delete";
      const classes = `${chat === current ? "current" : ""} ${runs.has(chat.id) ? "running" : ""}`;
      return h("li", { id: `chat-${chat.id}`, class: classes }, open, rename, remove);
    }),
  );
  if (focused) document.getElementById(focusId)?.querySelector(`[data-what="${focusClass}"]`)?.focus();
}

function renameChat(chat) {
  const item = $(`chat-${chat.id}`);
  const field = h("input", { type: "text", maxlength: 200, "aria-label": "Title of the chat" });
  let finished = false;
  const finish = (keep) => {
    if (finished) return; // taking a focused field off the page makes it lose the focus, which ends here again
    finished = true;
    if (keep && field.value.trim()) [chat.title, chat.named] = [field.value.trim(), true];
    field.remove();
    $("chats").state = null;
    save(chat);
    renderState();
    $(`chat-${chat.id}`)?.querySelector('[data-what="rename"]').focus();
  };
  field.value = titleOf(chat);
  field.addEventListener("keydown", (event) => {
    if (event.isComposing) return;
    if (event.key === "Enter") {
      event.preventDefault();
      finish(true);
    } // or it would press the button that gets the focus
    if (event.key === "Escape") {
      event.stopPropagation();
      finish(false);
    }
  });
  item.replaceChildren(field);
  field.focus();
  field.select();
  field.addEventListener("blur", () => finish(true));
}

function deleteChat(chat) {
  const place = byDate().indexOf(chat);
  runs.get(chat.id)?.stop("stopped");
  chats.delete(chat.id);
  try {
    localStorage.removeItem(CHAT_KEY + chat.id);
  } catch {
    /* was never saved */
  }
  const wasOpen = chat === current;
  if (wasOpen) openChat(byDate()[place] ?? byDate()[place - 1] ?? newChat(), { focus: false });
  renderChats();
  ($("chats").children[place] ?? $("chats").lastElementChild)?.querySelector(".open").focus();
  toast(`“${titleOf(chat).slice(0, 40)}” deleted.`, "Undo", () => {
    chats.set(chat.id, chat);
    save(chat);
    if (wasOpen) openChat(chat);
  });
}
