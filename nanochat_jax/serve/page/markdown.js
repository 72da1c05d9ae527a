/* Markdown to nodes. */

const FENCE = /^ {0,3}(`{3,}|~{3,})[ \t]*([^\s`]*)[^`]*$/;
const HEADING = /^ {0,3}(#{1,6})[ \t]+(.*?)(?:[ \t]+#+)?[ \t]*$/;
const RULE = /^ {0,3}([-*_])(?:[ \t]*\1){2,}[ \t]*$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( *)([-*+]|(\d{1,9})[.)])(?: +|$)/;
const TABLE_LINE = /^ {0,3}\|?[ \t]*:?-+:?[ \t]*(?:\|[ \t]*:?-+:?[ \t]*)*\|?[ \t]*$/;
const MAX_DEPTH = 8; // of lists in quotes in lists; deeper text stays as it is written

/** The blocks of some lines: {kind, source, ...}. The same source gives the same block, so unchanged ones can stay. */
function splitBlocks(lines) {
  const blocks = [];
  const isTable = (i) => lines[i].includes("|") && lines[i + 1]?.includes("|") && TABLE_LINE.test(lines[i + 1]);
  const starts = (line) => FENCE.test(line) || HEADING.test(line) || RULE.test(line) || QUOTE.test(line);
  for (let i = 0; i < lines.length;) {
    const from = i;
    const line = lines[i];
    let block;
    let match;
    if (!line.trim()) {
      i++;
      continue;
    }
    if ((match = FENCE.exec(line))) {
      const closing = (text) => text.trim().length >= match[1].length && text.trim().split(match[1][0]).join("") === "";
      for (i++; i < lines.length && !closing(lines[i]);) i++;
      block = { kind: "code", language: match[2], text: lines.slice(from + 1, i).join("\n") };
      i++;
    } else if ((match = HEADING.exec(line))) {
      i++;
      block = { kind: "heading", level: match[1].length, text: match[2] };
    } else if (RULE.test(line)) {
      i++;
      block = { kind: "rule" };
    } else if (QUOTE.test(line)) {
      while (i < lines.length && QUOTE.test(lines[i])) i++;
      block = { kind: "quote", lines: lines.slice(from, i).map((text) => text.replace(QUOTE, "")) };
    } else if (ITEM.test(line)) {
      [block, i] = readList(lines, i, starts);
    } else if (isTable(i)) {
      for (i += 2; i < lines.length && lines[i].includes("|");) i++;
      block = { kind: "table", rows: [lines[from], ...lines.slice(from + 2, i)].map(splitRow) };
    } else {
      for (
        i++;
        i < lines.length &&
        lines[i].trim() &&
        !starts(lines[i]) &&
        !isTable(i) &&
        !/^ {0,3}([-*+]|1[.)]) /.test(lines[i]);
      )
        i++;
      block = { kind: "paragraph", text: lines.slice(from, i).join("\n") };
    }
    blocks.push({ ...block, source: lines.slice(from, i).join("\n") });
  }
  return blocks;
}

/** The list that starts at line i, and the line after it. */
function readList(lines, i, starts) {
  const [, indent, marker, first] = ITEM.exec(lines[i]);
  const ordered = first !== undefined;
  const items = [];
  for (; i < lines.length; i++) {
    const line = lines[i];
    const match = ITEM.exec(line);
    const depth = line.length - line.trimStart().length;
    if (match && depth < indent.length + 2 && (match[3] !== undefined) === ordered && !RULE.test(line)) {
      items.push({ width: match[0].length, lines: [line.slice(match[0].length)] });
    } else if (!line.trim()) {
      const next = lines.slice(i + 1, i + 3).find((text) => text.trim()) ?? "";
      const nextItem = ITEM.exec(next);
      const deeper = next.length - next.trimStart().length > indent.length + 1;
      if (!deeper && !(nextItem && (nextItem[3] !== undefined) === ordered)) break;
      items.at(-1).lines.push("");
    } else if (depth > indent.length + 1 || (!match && lines[i - 1].trim() && !starts(line))) {
      items.at(-1).lines.push(line.slice(Math.min(depth, items.at(-1).width)));
    } else break;
  }
  return [{ kind: "list", ordered, start: Number(first ?? 1), items: items.map((item) => item.lines) }, i];
}

const splitRow = (line) =>
  line
    .trim()
    .replace(/^\||\|$/g, "")
    .split("|")
    .map((cell) => cell.trim());

const sourceOf = new WeakMap();

/** Shows text in a container; blocks that are there already stay: a growing answer keeps selection and scroll. */
function renderMarkdown(container, text) {
  const blocks = splitBlocks(text.replace(/\t/g, "    ").split("\n"));
  blocks.forEach((block, index) => {
    const old = container.children[index];
    if (old && sourceOf.get(old) === block.source) return;
    const fresh = renderBlock(block, 0);
    sourceOf.set(fresh, block.source);
    if (old) old.replaceWith(fresh);
    else container.append(fresh);
  });
  while (container.children.length > blocks.length) container.lastChild.remove();
}

function renderBlock(block, depth) {
  const nested = (tag, lines) =>
    h(
      tag,
      {},
      ...(depth < MAX_DEPTH ? splitBlocks(lines).map((inner) => renderBlock(inner, depth + 1)) : [lines.join("\n")]),
    );
  switch (block.kind) {
    case "heading":
      return h(`h${block.level}`, {}, ...inline(block.text));
    case "rule":
      return h("hr");
    case "quote":
      return nested("blockquote", block.lines);
    case "code": {
      const button = h(
        "button",
        { type: "button", class: "plain-button", "aria-label": "Copy code", click: () => copy(block.text, button) },
        "Copy",
      );
      return h(
        "div",
        { class: "code" },
        h("header", {}, h("span", {}, block.language), button),
        h("pre", { tabindex: "0", "aria-label": "Code" }, h("code", {}, block.text)),
      );
    }
    case "list": {
      const items = block.items.map((lines) => {
        const [only, ...others] = splitBlocks(lines);
        if (only?.kind === "paragraph" && others.every((inner) => inner.kind === "list") && depth < MAX_DEPTH) {
          return h("li", {}, ...inline(only.text), ...others.map((inner) => renderBlock(inner, depth + 1)));
        }
        return nested("li", lines);
      });
      return h(
        block.ordered ? "ol" : "ul",
        { start: block.ordered && block.start !== 1 ? block.start : null },
        ...items,
      );
    }
    case "table": {
      const row = (cells, tag) => h("tr", {}, ...cells.map((cell) => h(tag, {}, ...inline(cell))));
      const [head, ...rows] = block.rows;
      return h(
        "div",
        { class: "table" },
        h("table", {}, h("thead", {}, row(head, "th")), h("tbody", {}, ...rows.map((cells) => row(cells, "td")))),
      );
    }
    default:
      return h("p", {}, ...inline(block.text));
  }
}

const MARKS = {
  "*1": ["em"],
  "*2": ["strong"],
  "*3": ["strong", "em"],
  _1: ["em"],
  _2: ["strong"],
  _3: ["strong", "em"],
  "~2": ["s"],
};
const isWord = (character) => /[\p{L}\p{N}_]/u.test(character ?? "");
const isBlank = (character) => character === undefined || /\s/.test(character);

/** A run of text as nodes: emphasis, code, links, line breaks. A mark that is never closed is looked for once. */
function inline(text, depth = 0) {
  const nodes = [];
  const unclosed = new Set();
  let plain = "";
  const push = (node) => {
    if (plain) nodes.push(plain);
    plain = "";
    nodes.push(node);
  };
  const runLength = (at) => {
    let end = at;
    while (text[end] === text[at]) end++;
    return end - at;
  };

  /** Where the run of n marks that closes the one before `from` begins, or -1. */
  const closing = (mark, n, from) => {
    const key = mark + n;
    if (unclosed.has(key)) return -1;
    for (let at = text.indexOf(mark, from); at >= 0; at = text.indexOf(mark, at)) {
      const length = runLength(at);
      const fits = mark === "`" || (!isBlank(text[at - 1]) && !(mark === "_" && isWord(text[at + length])));
      if (length === n && fits) return at;
      at += length;
    }
    unclosed.add(key);
    return -1;
  };

  for (let i = 0; i < text.length;) {
    const character = text[i];
    if (character === "\\" && /[!-/:-@[-`{-~]/.test(text[i + 1] ?? "")) {
      plain += text[i + 1];
      i += 2;
    } else if (character === "\n") {
      push(h("br"));
      i++;
    } else if (character === "`") {
      const n = runLength(i);
      const end = closing("`", n, i + n);
      if (end < 0) {
        plain += text.slice(i, i + n);
        i += n;
        continue;
      }
      push(h("code", {}, text.slice(i + n, end).replace(/^ ([^]*[^ ][^]*) $/, "$1")));
      i = end + n;
    } else if (character === "*" || character === "_" || character === "~") {
      const n = runLength(i);
      const tags = MARKS[character + n];
      const opens = tags && depth < MAX_DEPTH && !isBlank(text[i + n]) && !(character === "_" && isWord(text[i - 1]));
      const end = opens ? closing(character, n, i + n) : -1;
      if (end < 0) {
        plain += text.slice(i, i + n);
        i += n;
        continue;
      }
      const inner = inline(text.slice(i + n, end), depth + 1);
      push(tags.reduceRight((children, tag) => [h(tag, {}, ...children)], inner)[0]);
      i = end + n;
    } else if (character === "[" || character === "h") {
      const found = character === "[" ? namedLink(text, i) : bareLink(text, i);
      if (!found) {
        plain += character;
        i++;
        continue;
      }
      const label = character === "[" && depth < MAX_DEPTH ? inline(found.label, MAX_DEPTH) : [found.label];
      push(h("a", { href: found.href, target: "_blank", rel: "noopener noreferrer" }, ...label));
      i = found.end;
    } else {
      plain += character;
      i++;
    }
  }
  if (plain) nodes.push(plain);
  return nodes;
}

/** An absolute http or https address, or null: nothing else becomes a link. */
function webAddress(text) {
  try {
    const url = new URL(text);
    return url.protocol === "http:" || url.protocol === "https:" ? url.href : null;
  } catch {
    return null;
  }
}

function namedLink(text, i) {
  const match =
    /^\[([^\]\n]{1,400})\]\(([^\s()]{1,2000}(?:\([^\s()]{0,200}\))?[^\s()]{0,200})(?: "[^"\n]{0,200}")?\)/.exec(
      text.slice(i, i + 3000),
    );
  const href = match && webAddress(match[2]);
  return href ? { label: match[1], href, end: i + match[0].length } : null;
}

function bareLink(text, i) {
  if (isWord(text[i - 1]) || !/^https?:\/\//.test(text.slice(i, i + 8))) return null;
  const address = /^[^\s<>"`]{1,2000}/.exec(text.slice(i, i + 2000))[0].replace(/[.,;:!?)\]}'*_]+$/, "");
  const href = webAddress(address);
  return href ? { label: address, href, end: i + address.length } : null;
}
