/* Slash commands. */

const COMMANDS = {
  clear: { help: [["", "Clear conversation"]], run: () => openChat(newChat()) },
  help: { help: [["", "Show this help message"]], run: () => say(helpText()) },
};
for (const [name, { command, name: words, range, min, max }] of Object.entries(SETTINGS).reverse()) {
  const Words = words[0].toUpperCase() + words.slice(1);
  COMMANDS[command] = {
    help: [
      ["", `Show current ${words}`],
      [" <value>", `Set ${words} (${(range ?? `${min} and ${max}`).replace(" and ", "-")})`],
    ],
    run(text) {
      if (!text) return say(`Current ${words}: ${setting(name) ?? "random"}`);
      try {
        choose(name, parseSetting(name, text));
        say(`${Words} set to ${setting(name) ?? "random"}`);
      } catch (error) {
        say(error.message);
      }
    },
  };
}

function helpText() {
  const lines = ["temperature", "topk", "topp", "maxtokens", "seed", "clear", "help"].flatMap((name) =>
    COMMANDS[name].help.map(([value, what]) => `/${name}${value} - ${what}`),
  );
  return ["Available commands:", ...lines].join("\n");
}

/** Runs "/name value" and says whether the text was a command at all: "/usr/bin is a folder" and " /help" are not. */
function runCommand(text) {
  const match = /^\/([a-z]+)(?:\s+([^]*))?$/i.exec(text.trimEnd());
  if (!match) return false;
  const command = COMMANDS[match[1].toLowerCase()];
  if (command) command.run((match[2] ?? "").trim());
  else say(`Unknown command /${match[1]}. /help lists them; a space before the slash sends it to the model.`);
  return true;
}

/** A line from the page itself: shown among the messages, never sent, never saved. */
function say(text) {
  $("empty")?.remove();
  $("log").append(h("div", { class: "console" }, text));
  scrollToEnd();
}
