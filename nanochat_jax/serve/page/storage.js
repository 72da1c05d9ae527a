/* What is kept in this browser. */

const CHAT_KEY = "nanochat.chat."; // + id: one entry a chat, so that two tabs do not overwrite each other's
const SETTINGS_KEY = "nanochat.settings";
const THEME_KEY = "nanochat.theme";
const CURRENT_KEY = "nanochat.current"; // this tab's open chat
const API_KEY = "nanochat.key"; // in sessionStorage: gone with the tab

function read(key) {
  try {
    return JSON.parse(localStorage.getItem(key));
  } catch {
    return null;
  }
}

function write(key, value) {
  try {
    localStorage.setItem(key, JSON.stringify(value));
  } catch {
    toast("The browser's storage is full or switched off, so this is not saved. Export the chats, then delete some.");
  }
}

/** chat: {id, title, named, kind: "chat" | "text", created, updated (ms), messages}
 *  message: {role: "user", content} or {role: "assistant", content, ...}, where an answer's content is a string or,
 *  where a tool was called, a list of {type: "text" | "python" | "python_output", text}: the format of finetuning data.
 *  An answer's other fields: end ("stop" | "length" | "stopped" | "lost" | "error", none while it is written), problem
 *  (a sentence), code (the server's name of the problem), prompt_tokens, completion_tokens, rate (tokens/s), wait (s
 *  to the first token). */
const chats = new Map();
let current; // the chat on the screen; in `chats` once it has a message

const newChat = () => ({
  id: newId(),
  title: "",
  named: false,
  kind: "chat",
  created: Date.now(),
  updated: Date.now(),
  messages: [],
});

function save(chat) {
  if (!chats.has(chat.id)) return; // deleted meanwhile
  write(CHAT_KEY + chat.id, chat);
  renderChats();
}

const titleOf = (chat) => chat.title || "New chat";
const PARTS = ["text", "python", "python_output"];

/** A copy of a chat from outside, holding only what this page knows. Throws an Error that says what is wrong. */
function checkedChat(data, where) {
  const need = (holds, what) => {
    if (!holds) throw new Error(`${where}: ${what}`);
  };
  const number = (value) => (Number.isFinite(value) && value >= 0 ? value : undefined);
  const string = (value) => (typeof value === "string" ? value : undefined);
  need(isObject(data), "a chat must be an object");
  need(Array.isArray(data.messages), '"messages" must be a list');
  const messages = data.messages.map((message, index) => {
    const here = `message ${index + 1}`;
    need(isObject(message), `${here} must be an object`);
    const { role, content } = message;
    need(role === "user" || role === "assistant", `${here}: "role" must be "user" or "assistant"`);
    const listed = role === "assistant" && Array.isArray(content);
    need(typeof content === "string" || listed, `${here}: "content" must be text`);
    if (listed) {
      for (const part of content) {
        need(
          isObject(part) && PARTS.includes(part.type) && typeof part.text === "string",
          `${here}: each part needs a "type" (${PARTS.join(", ")}) and a "text"`,
        );
      }
    }
    const copied = { role, content: listed ? content.map(({ type, text }) => ({ type, text })) : content };
    if (role === "user") return copied;
    const end = ["stop", "length", "stopped", "lost", "error"].includes(message.end) ? message.end : undefined;
    return {
      ...copied,
      end,
      problem: string(message.problem),
      code: string(message.code),
      rate: number(message.rate),
      wait: number(message.wait),
      prompt_tokens: number(message.prompt_tokens),
      completion_tokens: number(message.completion_tokens),
    };
  });
  return {
    id: /^[\w-]{1,64}$/.test(data.id) ? data.id : newId(),
    title: (string(data.title) ?? "").slice(0, 200),
    named: data.named === true,
    kind: data.kind === "text" ? "text" : "chat",
    created: number(data.created) ?? Date.now(),
    updated: number(data.updated) ?? Date.now(),
    messages,
  };
}

function loadChat(key) {
  try {
    const fresh = checkedChat(read(key), key);
    const chat = Object.assign(chats.get(fresh.id) ?? {}, fresh); // a chat stays the same object
    chats.set(chat.id, chat);
    return chat;
  } catch {
    /* not ours, or damaged: left alone */
  }
}

function loadChats() {
  try {
    for (const key of Object.keys(localStorage)) if (key.startsWith(CHAT_KEY)) loadChat(key);
  } catch {
    /* storage is switched off: chats last as long as the page */
  }
}

const FORMAT = "nanochat-chats";

function exportChats() {
  const data = { format: FORMAT, version: 1, exported: new Date().toISOString(), chats: byDate() };
  const url = URL.createObjectURL(new Blob([JSON.stringify(data, null, 1)], { type: "application/json" }));
  h("a", { href: url, download: `nanochat-chats-${new Date().toISOString().slice(0, 10)}.json` }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10000);
}

/** Takes a whole file or, if anything in it is wrong, nothing. A chat that is here already is not taken twice. */
async function importChats(file) {
  const same = (a, b) => JSON.stringify(a.messages) === JSON.stringify(b.messages);
  try {
    if (file.size > 50e6) throw new Error("the file is larger than 50 MB");
    let data;
    try {
      data = JSON.parse(await file.text());
    } catch {
      throw new Error("the file is not JSON");
    }
    if (data?.format !== FORMAT || !Array.isArray(data.chats))
      throw new Error("the file was not exported from this page");
    if (data.version !== 1) throw new Error(`the file has version ${data.version}; this page reads version 1`);
    const all = data.chats
      .map((chat, index) => checkedChat(chat, `chat ${index + 1}`))
      .filter((chat) => chat.messages.length);
    const fresh = all.filter((chat) => !chats.has(chat.id) || !same(chats.get(chat.id), chat));
    for (const chat of fresh) {
      if (chats.has(chat.id)) chat.id = newId();
      chats.set(chat.id, chat);
      save(chat);
    }
    const known = all.length - fresh.length;
    toast(`${plural(fresh.length, "chat")} imported${known ? `, ${known} already here` : ""}.`);
  } catch (error) {
    toast(`Nothing was imported: ${error.message}.`);
  }
}
