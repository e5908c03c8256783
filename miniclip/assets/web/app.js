// The page around the model: classes to type, pictures to choose or drop, and a search.

import { Clip } from "./clip.js";

const $ = (id) => document.getElementById(id);
const SHOWN = 5; // classes of each picture
let clip = null, chosen = [], run = 0, asked = 0;

function say(text, isError = false) {
  $("state").textContent = text;
  $("state").classList.toggle("error", isError);
}

function made(tag, text = "", properties = {}) {
  return Object.assign(document.createElement(tag), { textContent: text }, properties);
}

// Names with commas between them; one that holds a comma stands in double quotes.
function names() {
  const cells = $("labels").value.matchAll(/\s*(?:"((?:[^"]|"")*)"|([^,]*))\s*(?:,|$)/g);
  const found = [...cells].map(([, quoted, plain]) => (quoted?.replaceAll('""', '"') ?? plain).trim());
  return [...new Set(found.filter(Boolean))];
}

function quoted(name) {
  return /[,"]/.test(name) ? `"${name.replaceAll('"', '""')}"` : name;
}

function templates(classes) {
  const own = clip.facts.templates;
  if (Array.isArray(own)) return own.length ? own : ["a photo of a {}."];
  return classes.every((name) => own[name]) ? own : ["a photo of a {}."];
}

async function classify() {
  const own = ++run, classes = names(), files = chosen;
  if (!files.length) return;
  if (!classes.length) {
    $("answers").replaceChildren();
    return say("Name the classes first, separated by commas.", true);
  }
  say("Looking…");
  const rows = [];
  for (const file of files) {
    let answer = null, problem = "";
    try {
      [answer] = await clip.classify([file], classes, templates(classes));
    } catch (error) {
      problem = error.message;
    }
    if (own !== run) return; // newer pictures or classes
    rows.push(row(file, answer, problem));
  }
  $("answers").replaceChildren(...rows);
  const isOther = clip.facts.threshold !== null && classes.join() !== clip.facts.classnames.join();
  say(isOther ? "The limit for “none of these” was calibrated with other classes." : "");
}

function row(file, answer, problem) {
  const item = made("li"), box = made("div"), url = URL.createObjectURL(file);
  item.append(made("img", "", { src: url, alt: file.name, onload: () => URL.revokeObjectURL(url) }), box);
  if (!answer) {
    box.append(made("strong", `${file.name} can’t be used: ${problem}`));
    return item;
  }
  const [best] = answer.guesses;
  box.append(made("strong", answer.isNone ? "none of these" : best.name, { className: "answer" }));
  for (const { name, probability, cosine } of answer.guesses.slice(0, SHOWN)) {
    const line = made("label", `${name}: ${(100 * probability).toFixed(1)} %, cosine ${cosine.toFixed(3)}`);
    line.append(made("meter", "", { min: 0, max: 1, value: probability }));
    box.append(line);
  }
  return item;
}

async function search(event) {
  event.preventDefault();
  const own = ++asked, query = $("words").value;
  let items = [], problem = "";
  try {
    if (!query.trim()) throw new Error("a query is empty; it must be a text");
    const [words] = await clip.encodeTexts([query]);
    items = (await clip.search(words)).map(({ name, thumbnail, cosine }) => {
      const item = made("li");
      item.append(made("img", "", { src: `search/${thumbnail}`, alt: name }), made("span", `${name}, ${cosine.toFixed(3)}`));
      return item;
    });
  } catch (error) {
    problem = error.message;
  }
  if (own !== asked) return; // newer words
  $("found").replaceChildren(...items);
  say(problem, Boolean(problem));
}

function take(files) {
  chosen = [...files].filter((file) => file.type.startsWith("image/"));
  classify();
}

async function start() {
  clip = await Clip.load();
  $("title").textContent = clip.facts.model;
  document.title = clip.facts.model;
  $("labels").value = clip.facts.classnames.map(quoted).join(", ");
  $("labels").addEventListener("change", classify);
  $("files").addEventListener("change", () => take($("files").files));
  document.addEventListener("dragover", (event) => event.preventDefault());
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    take(event.dataTransfer.files);
  });
  $("search").addEventListener("submit", search);
  $("search-section").hidden = !clip.facts.num_pictures;
  $("count").textContent = clip.facts.num_pictures;
  $("work").hidden = false;
  say("");
}

start().catch((error) => say(`The model can’t be loaded: ${error.message}`, true));
