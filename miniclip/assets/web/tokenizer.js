// CLIP's tokenizer, with miniclip's ids: cleaning by table, then byte-pair encoding from tokenizer.json.
// Text that was decoded wrongly, or holds a special token's name, is refused with an Error.

const SPACES = /[\t-\r\x1c-\x20\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]+/u; // Python's
const CHARACTER_REFERENCE = /&(#[0-9]+;?|#[xX][0-9a-fA-F]+;?|[^\t\n\f <&#;]{1,32};?)/gu;
const END_OF_WORD = "</w>";

export class Tokenizer {
  constructor(file, cleaning) {
    this.cleaning = cleaning;
    this.mojibake = new RegExp(cleaning.mojibake.replaceAll("\\w", "[\\p{L}\\p{N}_]"), "u"); // Python's \w
    this.lower = new Map(Object.entries(cleaning.lower));
    this.controls = new Set(cleaning.controls);
    this.html = new Map(Object.entries(cleaning.html));
    this.entities = new Map(Object.entries(cleaning.entities));
    this.characters = new Map(Object.entries(cleaning.characters));
    this.numbers = new Map(Object.entries(cleaning.numbers));
    this.length = file.truncation.max_length;
    this.vocabulary = new Map(Object.entries(file.model.vocab));
    this.ranks = new Map(file.model.merges.map((pair, rank) => [Array.isArray(pair) ? pair.join(" ") : pair, rank]));
    this.pieces = new RegExp(file.pre_tokenizer.pretokenizers[0].pattern.Regex, "gu");
    [this.start, this.end] = file.added_tokens.map((token) => token.id);
    this.symbols = byteSymbols();
    this.words = new Map(); // piece -> its ids
  }

  // A text's ids between start and end, cut to the context length.
  encode(text) {
    const ids = [];
    for (const piece of this.clean(text).match(this.pieces) ?? []) {
      if (!this.words.has(piece)) this.words.set(piece, this.merge(piece));
      ids.push(...this.words.get(piece));
    }
    return [this.start, ...ids.slice(0, this.length - 2), this.end];
  }

  clean(text) {
    if (!/^[\t\n\r -%'-~]*$/.test(text)) {
      let isPlain = true;
      const lines = text.split("\n").map((line) => {
        isPlain = isPlain && !line.includes("<"); // up to the first line that may be HTML
        return this.cleanLine(line, isPlain);
      });
      text = this.unescape(this.unescape(lines.join("\n")));
    }
    text = this.lowered(text.split(SPACES).filter(Boolean).join(" "));
    if (this.cleaning.special.some((name) => text.includes(name)))
      throw new Error(`“${text}” holds the name of a special token; write it in other words`);
    return text;
  }

  // By table, as browsers know other years' letters. A sigma's form depends on its neighbours.
  lowered(text) {
    let at = 0;
    return [...text].map((each) => {
      const found = each === "Σ" ? sigma(text, at) : (this.lower.get(each) ?? each);
      at += each.length;
      return found;
    }).join("");
  }

  cleanLine(line, isPlain) {
    for (let before = null; before !== line; ) {
      before = line;
      if (isPlain) line = line.replace(/&#?[0-9A-Za-z]{1,24};/g, (entity) => this.entity(entity));
      if (/[^\x00-\x7f]/.test(line) && this.mojibake.test(line))
        throw new Error(`“${line}” looks like text that was decoded wrongly; write it as it is meant`);
      line = [...line].map((each) => this.characters.get(each) ?? each).join("").toWellFormed();
      line = line.replace(/\x1b\[[\d;]*[a-zA-Z]/g, "");
      line = [...line].filter((each) => !this.controls.has(each)).join("").normalize("NFC");
    }
    return line;
  }

  entity(text) {
    const found = text.startsWith("&#") ? this.unescape(text) : (this.entities.get(text) ?? text);
    return found.includes(";") ? text : found;
  }

  // HTML's character references, as Python's html.unescape reads them.
  unescape(text) {
    return text.replace(CHARACTER_REFERENCE, (whole, name) => {
      if (name.startsWith("#")) {
        const digits = name.slice(1).replace(";", "");
        const code = /^[xX]/.test(digits) ? parseInt(digits.slice(1), 16) : parseInt(digits, 10);
        const special = this.numbers.get(String(code));
        if (special !== undefined) return special;
        return code > 0x10ffff || (code >= 0xd800 && code <= 0xdfff) ? "\ufffd" : String.fromCodePoint(code);
      }
      if (this.html.has(name)) return this.html.get(name);
      for (let end = name.length - 1; end > 1; end--) {
        const found = this.html.get(name.slice(0, end));
        if (found !== undefined) return found + name.slice(end);
      }
      return whole;
    });
  }

  // The merge learnt first is applied first, and among equal ones the leftmost.
  merge(piece) {
    let parts = [...new TextEncoder().encode(piece)].map((byte) => this.symbols[byte]);
    parts[parts.length - 1] += END_OF_WORD;
    for (;;) {
      let best = Infinity, at = -1;
      for (let i = 0; i + 1 < parts.length; i++) {
        const rank = this.ranks.get(`${parts[i]} ${parts[i + 1]}`);
        if (rank < best) [best, at] = [rank, i];
      }
      if (at < 0) return parts.map((part) => this.vocabulary.get(part));
      parts.splice(at, 2, parts[at] + parts[at + 1]);
    }
  }
}

function sigma(text, at) {
  return text.toLowerCase().charAt(text.slice(0, at).toLowerCase().length);
}

// The printable character that stands for each byte: Latin-1's own, or the next from U+0100 on.
function byteSymbols() {
  const isOwn = (byte) => (byte >= 33 && byte <= 126) || (byte >= 161 && byte <= 172) || byte >= 174;
  let next = 256;
  return Array.from({ length: 256 }, (_, byte) => String.fromCodePoint(isOwn(byte) ? byte : next++));
}
