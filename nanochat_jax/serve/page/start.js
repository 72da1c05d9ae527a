/* Listeners, and the start. */

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  submit($("input").value);
});
$("input").addEventListener("input", fitInput);
$("input").addEventListener("keydown", (event) => {
  if (event.isComposing) return; // Enter ends the composition of a character there
  if (event.key === "Enter" && !event.shiftKey) {
    event.preventDefault();
    submit($("input").value);
  } else if (event.key === "ArrowUp" && !$("input").value) {
    const last = current.messages.findLast((message) => message.role === "user");
    if (last && !runs.has(current.id)) {
      event.preventDefault();
      editTurn(current, last);
    }
  }
});
$("stop").addEventListener("click", stop);
$("new-chat").addEventListener("click", () => openChat(newChat()));
$("to-end").addEventListener("click", scrollToEnd);
scroller.addEventListener("scroll", () => {
  $("to-end").hidden = atEnd();
});
$("export").addEventListener("click", exportChats);
$("import").addEventListener("click", () => $("import-file").click());
$("import-file").addEventListener("change", async () => {
  const [file] = $("import-file").files;
  if (file) await importChats(file);
  $("import-file").value = "";
});
$("toggle-sidebar").addEventListener("click", () => {
  const shown = $("app").classList.contains("no-sidebar");
  showSidebar(shown);
  if (shown && narrow.matches) $("new-chat").focus();
});
$("scrim").addEventListener("click", () => showSidebar(false));
narrow.addEventListener("change", () => showSidebar(!narrow.matches));
$("toggle-settings").addEventListener("click", () => showSettings($("settings").hidden));
$("close-settings").addEventListener("click", () => showSettings(false));
$("reset-settings").addEventListener("click", () => {
  chosen = {};
  write(SETTINGS_KEY, chosen);
  renderSettings();
});
$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  $("key-dialog").close("entered");
});
$("key-cancel").addEventListener("click", () => $("key-dialog").close("cancelled"));
$("key-dialog").addEventListener("cancel", () => {
  $("key-dialog").returnValue = "cancelled";
});

document.addEventListener("keydown", (event) => {
  if (event.isComposing || $("key-dialog").open) return;
  if (event.key === "Escape") {
    if (runs.has(current.id)) stop();
    else if (!$("settings").hidden) showSettings(false);
    else if (narrow.matches && !$("app").classList.contains("no-sidebar")) {
      showSidebar(false);
      $("toggle-sidebar").focus();
    }
  } else if (event.key.toLowerCase() === "o" && event.shiftKey && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    openChat(newChat());
  }
});
window.addEventListener("online", checkServer);
document.addEventListener("visibilitychange", () => {
  if (document.visibilityState === "visible") checkServer();
  else for (const run of runs.values()) save(run.chat);
});
window.addEventListener("pagehide", () => {
  for (const run of runs.values()) {
    run.stop("left");
    save(run.chat);
  }
});
window.addEventListener("storage", ({ key, newValue }) => {
  // another tab has changed something
  if (key === SETTINGS_KEY) {
    loadSettings();
    renderSettings();
  }
  if (!key?.startsWith(CHAT_KEY) || runs.has(key.slice(CHAT_KEY.length))) return;
  const id = key.slice(CHAT_KEY.length);
  if (newValue === null) chats.delete(id);
  else if (loadChat(key) && current.id === id && !document.querySelector("form.edit"))
    openChat(chats.get(id), { focus: false });
  renderChats();
});

setTheme(THEMES.includes(read(THEME_KEY)) ? read(THEME_KEY) : "auto");
loadSettings();
buildSettings();
renderSettings();
showSidebar(!narrow.matches);
loadChats();
let opened = null;
try {
  opened = chats.get(sessionStorage.getItem(CURRENT_KEY));
} catch {
  /* a new chat, then */
}
openChat(opened ?? newChat());
checkServer();
