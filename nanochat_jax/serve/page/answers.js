/* Asking for an answer. */

const runs = new Map(); // chat id -> Run: the answers that are being written, in this tab

class Run {
  constructor(chat, message) {
    this.chat = chat;
    this.message = message;
    this.abort = new AbortController();
    this.why = null; // what stopped it: "stopped" by the user, "lost" as the server fell silent, "left" with the page
    this.began = this.heard = seconds();
    this.waiting = ""; // a sentence while the server makes us wait
  }

  stop(why) {
    this.why ??= why;
    this.abort.abort();
  }

  /** Shows the message at the next frame, saves it at most once a second. */
  changed() {
    this.frame ??= requestAnimationFrame(() => {
      this.frame = null;
      refreshTurn(this.chat, this.message);
    });
    this.saving ??= setTimeout(() => {
      this.saving = null;
      save(this.chat);
    }, 1000);
  }
}

/** The messages as the API wants them: roles alternate, and an answer of which nothing came is left out. */
function history(chat, until) {
  const sent = [];
  for (const message of chat.messages.slice(0, chat.messages.indexOf(until))) {
    const empty = message.role === "assistant" && !piecesOf(message.content).length;
    if (empty) continue;
    const last = sent.at(-1);
    if (message.role === "user" && last?.role === "user") last.content += `\n\n${message.content}`;
    else sent.push({ role: message.role, content: message.content });
  }
  return sent;
}

function requestBody(chat, message) {
  const body = { stream: true, stream_options: { include_usage: true } };
  for (const name of Object.keys(SETTINGS)) if (setting(name) !== null) body[name] = setting(name);
  if (chat.kind === "text") body.prompt = before(chat, message).content + textOf(message);
  else {
    body.messages = history(chat, message);
    if (chosen.shorten) body.truncate_history = true;
  }
  if (chosen.alternatives) Object.assign(body, chat.kind === "text" ? { logprobs: 5 } : { logprobs: true, top_logprobs: 5 });
  return body;
}

/** Sends a request that the server may put off (429), and returns a response whose body streams. */
async function ask(run, path, body) {
  const { signal } = run.abort;
  for (let tries = 1; ; tries++) {
    const response = await request(path, {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(body),
      signal,
    });
    if (response.ok) return response;
    if (response.status !== 429 || tries > 5) throw await serverError(response);
    let left = Math.min(60, Number(response.headers.get("Retry-After")) || 2 ** tries);
    for (; left > 0; left -= 1) {
      run.waiting = `The server is busy. Next try in ${Math.ceil(left)} s.`;
      run.heard = seconds();
      run.changed();
      await pause(Math.min(1, left), signal);
    }
    run.waiting = "";
  }
}

/** The JSON objects of a stream of server-sent events, whole ones only, until "[DONE]" or the end of the stream. */
async function* events(stream, run) {
  const reader = stream.getReader();
  const decoder = new TextDecoder();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    run.heard = seconds();
    const lines = (rest + decoder.decode(value, { stream: true })).split(/\r?\n/);
    rest = lines.pop();
    for (const line of lines) {
      const data = line.startsWith("data:") ? line.slice(5).trim() : "";
      if (data === "[DONE]") return;
      if (data) yield JSON.parse(data);
    }
  }
}

const known = new WeakMap(); // message -> its tokens: { text, chance, others: [[text, chance], ...] }; not kept with chats

/** The tokens of either kind of a completion's logprobs. */
function tokensOf(logprobs) {
  if (logprobs.content)
    return logprobs.content.map(({ token, logprob, top_logprobs }) => ({
      text: token,
      chance: Math.exp(logprob),
      others: top_logprobs.map((other) => [other.token, Math.exp(other.logprob)]),
    }));
  return logprobs.tokens.map((text, i) => ({
    text,
    chance: Math.exp(logprobs.token_logprobs[i]),
    others: Object.entries(logprobs.top_logprobs[i] ?? {}).map(([other, value]) => [other, Math.exp(value)]),
  }));
}

/** Every token of an answer, the darker the less likely it was; its title says what else could have come. */
function tokenView(message) {
  const percent = (chance) => `${(100 * chance).toFixed(chance < 0.1 ? 1 : 0)} %`;
  const spans = known.get(message).map(({ text, chance, others }) => {
    const lines = [[text, chance], ...others.filter(([other]) => other !== text)];
    lines.sort((a, b) => b[1] - a[1]);
    const title = lines.map(([other, p]) => `${percent(p)}  ${other === text ? "→ " : ""}${JSON.stringify(other)}`);
    const span = h("span", { title: title.join("\n"), tabindex: "0" }, text);
    span.style.setProperty("--doubt", `${Math.round(45 * (1 - chance))}%`);
    return span;
  });
  return h("details", { class: "tokens" }, h("summary", {}, "What else it could have said"), h("div", {}, ...spans));
}

/** Books one chunk of a stream into the message. True if it brought text or a tool call. */
function takeChunk(message, chunk) {
  if (chunk.error) throw new ServerError(chunk.error.message || "The server reported an error.", chunk.error.code);
  if (chunk.usage) {
    message.prompt_tokens = chunk.usage.prompt_tokens;
    message.completion_tokens = chunk.usage.completion_tokens;
  }
  const choice = chunk.choices?.[0];
  if (!choice) return false;
  const tool = choice.delta?.tool; // its content is the same as text, "<12+30" and "=42>"
  let text = tool ? "" : (choice.delta?.content ?? choice.text ?? "");
  if (tool) appendPart(message, "call" in tool ? "python" : "python_output", tool.call ?? tool.result);
  else if (text.startsWith(">") && Array.isArray(message.content) && message.content.at(-1)?.type === "python")
    text = text.slice(1); // closes a call without a result
  if (text) appendPart(message, "text", text);
  if (choice.logprobs) known.set(message, [...(known.get(message) ?? []), ...tokensOf(choice.logprobs)]);
  if (choice.finish_reason) message.end = choice.finish_reason === "length" ? "length" : "stop";
  return Boolean(tool || text);
}

/** Asks for an answer to the message before `index` or, given an answer, for more of it (a base model's page). */
async function generate(chat, index = chat.messages.length, message = null) {
  if (runs.has(chat.id)) return;
  const fresh = !message;
  message ??= { role: "assistant", content: "" };
  for (const name of ["end", "problem", "code", "rate", "wait"]) delete message[name];
  if (fresh) chat.messages.splice(index, 0, message);
  const run = new Run(chat, message);
  runs.set(chat.id, run);
  if (fresh && chat === current) addTurn(chat, message);
  refreshTurn(chat, message);
  save(chat);
  renderState();
  announce("Answering");
  let first = 0;
  let last = 0;
  try {
    const response = await ask(
      run,
      chat.kind === "text" ? "v1/completions" : "v1/chat/completions",
      requestBody(chat, message),
    );
    for await (const chunk of events(response.body, run)) {
      if (takeChunk(message, chunk)) {
        last = seconds();
        first ||= last;
      }
      run.changed();
    }
    if (!message.end) throw new Error("the stream ended before the answer");
  } catch (error) {
    if (!message.end) explain(run, error);
  } finally {
    finish(run, first, last);
  }
}

/** Writes into the message why it is not whole. */
function explain({ message, why }, error) {
  if (why === "stopped") {
    message.end = "stopped";
  } else if (why === "left") {
    Object.assign(message, { end: "lost", problem: "The page was closed before this answer was complete." });
  } else if (error.code === "shutting_down") {
    Object.assign(message, { end: "lost", problem: "The server was stopped here. What had arrived is kept." });
  } else if (error instanceof ServerError) {
    Object.assign(message, { end: "error", problem: error.message, code: error.code });
  } else {
    message.end = "lost";
    message.problem = piecesOf(message.content).length
      ? "The connection to the server broke off here. What had arrived is kept."
      : "The server does not answer. Your message is kept.";
  }
}

function finish(run, first, last) {
  const { chat, message } = run;
  clearTimeout(run.saving);
  cancelAnimationFrame(run.frame);
  if (runs.get(chat.id) === run) runs.delete(chat.id);
  if (first) {
    message.wait = first - run.began;
    const tokens = message.completion_tokens;
    if (tokens)
      message.rate = last - first > 0.05 ? (tokens - 1) / (last - first) : tokens / Math.max(last - run.began, 0.001);
  }
  refreshTurn(chat, message);
  save(chat);
  renderChats();
  renderState();
  announce(
    message.end === "stop" || message.end === "length"
      ? "Answer complete"
      : message.end === "stopped"
        ? "Stopped"
        : message.problem,
  );
  if (message.end === "lost" && run.why !== "left") checkServer();
}
