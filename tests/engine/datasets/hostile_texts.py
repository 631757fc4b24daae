"""Encodings, line ends, JSON and tables as text."""

from __future__ import annotations

import json

from hostile import ANY, ONCE, file

# --- encodings ------------------------------------------------------------------------------------

TEXTS = {
    "utf-8": "naïve café, 日本語, emoji 🙂",
    "utf-8-sig": "naïve café, 日本語, emoji 🙂",
    "utf-16": "naïve café, 日本語, emoji 🙂",
    "utf-16-le": "plain English words and a naïve café",
    "utf-16-be": "plain English words and a naïve café",
    "utf-32": "naïve café, 日本語, emoji 🙂",
    "utf-32-le": "naïve café, 日本語, emoji 🙂",
    "utf-32-be": "naïve café, 日本語, emoji 🙂",
    "cp1252": "Für immer – “quoted”, crème brûlée and a naïve café.",
    "cp1250": "Zażółć gęślą jaźń. Pójdźże, kiń tę chmurność w głąb flaszy!",
    "cp1251": "Привет, мир! Это русский текст для проверки кодировки.",
    "koi8_r": "Привет, мир! Это русский текст для проверки кодировки.",
    "cp1253": "Καλημέρα κόσμε, αυτό είναι ένα κείμενο.",
    "shift_jis": "これは日本語のテキストです。文字コードの検出を試します。",
    "euc_jp": "これは日本語のテキストです。文字コードの検出を試します。",
    "gb18030": "这是一个中文文本，用来测试编码检测。",
    "big5": "這是一個中文文本，用來測試編碼檢測。",
    "cp949": "안녕하세요. 이것은 한국어 텍스트입니다.",
}
for codec, text in TEXTS.items():
    many = [text] * 20
    rows = "".join(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in many)
    file("a.txt", text.encode(codec), [text], of=codec)
    file("a.jsonl", rows.encode(codec), many, of=codec)
    file("a.json", json.dumps(many, ensure_ascii=False).encode(codec), many, of=codec)
    file("a.csv", ("text\n" + f'"{text}"\n' * 20).encode(codec), many, of=codec)

LONG = b"Only plain words. " * 5000  # longer than what the encoding is told from
REPLACED = "\N{REPLACEMENT CHARACTER}"
file("a.txt", b"fine \xe4\xb8\xad\n" * 3 + b"bad \xff end", "line 4: byte 0xff", 1, of="stray byte")
file("a.txt", LONG + b"\n\xe9t\xe9\xff\xfe\n" + LONG, ANY, ANY, of="Latin-1 far behind")
file(
    "a.txt", "é".encode() + LONG + b"\n\xff\n", "line 2: byte 0xff", ANY, of="not UTF-8 far behind"
)
file("a.txt", "日本".encode()[:-1], ANY, ANY, of="cut inside a character")
file("a.txt", b"caf\xc0\xa9 \xe4\xb8\xad" * 9, ANY, ANY, of="overlong UTF-8")
file("a.txt", b"a \xed\xa0\xbd\xed\xb8\x80 b", ANY, ANY, of="surrogates as UTF-8")
file("a.txt", b"\xef\xbb\xbf" + "text".encode("utf-16"), "line 1: byte", ANY, of="false mark")
file("a.txt", "text and more".encode("utf-16") + b"x", "line 1: byte", 1, of="half a UTF-16 unit")
file("a.txt", b"\xff\xfea\0\x00\xd8b\0", "line 1: byte", [f"a{REPLACED}b"], of="lone in UTF-16")
file("a.txt", b"\xff\xfe\0\0" + b"\xff\xff\xff\x7f" * 4, "byte 0xff", ANY, of="beyond Unicode")
file("a.txt", b"\xef\xbb\xbf", "No text found", of="a mark alone")
file("a.txt", b"\xff\xfe", "No text found", of="a UTF-16 mark alone")
file("a.txt", bytes(range(256)) * 10, "not a text file", of="all bytes")
file("a.txt", b"\0" * 5000, "not a text file", of="zeros")
file("a.txt", b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 4, "not a text file", of="picture")
file("a.txt", b"PK\x03\x04" + bytes(range(256)), "zip archive", of="zip")
file("a.txt", b"\x7fELF\2\1\1" + b"\0" * 90, "not a text file", of="program")
file("a.txt", b"PAR1\0\0\0\0", "not a text file", of="Parquet as txt")
file(
    "a.txt", b"one\0two three and some more words", ["one\0two three and some more words"], of="NUL"
)
file(
    "b.jsonl",
    b'{"text": "\xc3\xa9\xc3\xa9\xc3\xa9"}\n{"text": "b\xff"}\n',
    "line 2: byte 0xff",
    ["ééé", f"b{REPLACED}"],
)
file("b.csv", "text\n中文字\n".encode() + b"\xff\n", "line 3: byte 0xff", ["中文字", REPLACED])

# --- lines ----------------------------------------------------------------------------------------

for name, end in {"CR": "\r", "CRLF": "\r\n", "LF": "\n"}.items():
    file("ends.txt", f"one{end}two{end}{end}three", [f"one{end}two{end}{end}three"], of=name)
    file("ends.jsonl", f'{{"text": "a"}}{end}{end}{{"text": "b"}}', ["a", "b"], of=name)
    file("ends.csv", f'id,text{end}1,"a{end}b"{end}2,c{end}{end}', [f"a{end}b", "c"], of=name)
    file("ends.tsv", f"text\tid{end}a b\t1", ["a b"], of=name)
file("mixed.jsonl", '{"text": "a"}\r{"text": "b"}\r\n{"text": "c"}\n', ["a", "b", "c"])
file("separators.jsonl", '{"text": "a\u2028b\x85c"}\n{"text": "d"}', ["a\u2028b\x85c", "d"])
file("blank.txt", " \n\t\n" * 500, "No text found")
file("blank.jsonl", "\n" * 500, "No text found")
file("heading.csv", "id,text\n", "No text found")
file("one_line.txt", "x" * 3_000_000, 30)
file("many_breaks.txt", "\n" * 200_000 + "text", ["text"])
file("megabyte.jsonl", json.dumps({"text": "y" * 1_048_576}), 1)
TOO_LONG = '{"text": "' + "z" * (17 * 1024**2) + '"}'
file(
    "long.jsonl",
    f'{{"text": "a"}}\n{TOO_LONG}\n{{"text": "b"}}',
    "line 2: it is larger",
    ["a", "b"],
)
file("long.csv", f"text\na\n{'z' * 17 * 1024**2}\nb\n", "line 3: it is larger", ["a", "b"])
file("long.json", f'[{{"text": "a"}}, {TOO_LONG}]', "an item of the list: it is larger", ONCE)

# --- JSON lines -----------------------------------------------------------------------------------

BAD_LINES = {
    "cut": '{"text": "cut',
    "no quotes": "{text: 1}",
    "single quotes": "{'text': 'a'}",
    "trailing comma": '{"text": "a",}',
    "two values": '{"text": "a"} {"text": "b"}',
    "deep lists": "[" * 100_000,
    "deep objects": '{"text": ' * 50_000,
    "deep and closed": "[" * 50_000 + "]" * 50_000,
    "huge number": '{"text": "a", "n": ' + "1" * 5000 + "}",
    "control character": '{"text": "a\x01b"}',
    "bad escape": '{"text": "\\x41"}',
    "half an escape": '{"text": "\\ud83',
    "words": "hello",
    "null": "null",
    "number": "3.5",
    "list": '["a", "b"]',
    "no text": '{"other": "words"}',
    "text is null": '{"text": null}',
    "text is a number": '{"text": 5}',
    "text is an object": '{"text": {"a": "b"}}',
    "text is a list": '{"text": ["a"]}',
    "text is true": '{"text": true}',
    "messages without role": '{"text": [{"content": "a"}]}',
    "message of numbers": '{"text": [{"role": 1, "content": 2}]}',
    "NUL": "\0",
}
for name, line in BAD_LINES.items():
    content = f'{{"text": "a"}}\n{line}\n{{"text": "b"}}\n'
    file("row.jsonl", content, "row.jsonl", ["a", "b"], of=name)
GOOD_LINES = {
    "lone surrogate": ('{"text": "a\\ud800b"}', f"a{REPLACED}b"),
    "pair": ('{"text": "\\ud83d\\ude00"}', "😀"),
    "NaN": ('{"text": "a", "n": NaN, "m": -Infinity}', "a"),
    "huge float": ('{"text": "a", "n": 1e999999}', "a"),
    "twice": ('{"text": "no", "text": "yes"}', "yes"),
    "escaped NUL": ('{"text": "a\\u0000b"}', "a\0b"),
    "right to left": ('{"text": "\u202eabc שלום"}', "\u202eabc שלום"),
    "many keys": ("{" + ",".join(f'"k{i}": 1' for i in range(20_000)) + ', "text": "a"}', "a"),
    "title is a list": ('{"text": "a", "title": ["x"], "topic": {}}', "a"),
}
for name, (line, text) in GOOD_LINES.items():
    file("good.jsonl", line, [text], of=name)
file("only_bad.jsonl", "{\n{\n", "line 1", "No text found")
file("no_text.jsonl", '{"a": 1, "b": [2]}\n', "none holds text")
file("mixed_schema.jsonl", '{"text": "a"}\n{"body": "b"}\n7\n', "row at line 2", ["a"])
file("json.jsonl", json.dumps([{"text": "a"}], indent=1), "line 1", ANY, of="JSON as lines")

# --- JSON -----------------------------------------------------------------------------------------

for name, content in {
    "cut": '[{"text": "a"},',
    "deep": "[" * 200_000,
    "deep objects": '{"a":' * 200_000,
    "trailing": '[{"text": "a"}] x',
    "number too long": '[{"text": "a", "n": ' + "7" * 5000 + "}]",
    "no value": "  \n ",
    "words": "hello there",
    "comment": '// note\n[{"text": "a"}]',
}.items():
    file("broken.json", content, "broken.json", of=name)
file("rows.json", '{"text": "a"}\n{"text": "b"}\n', ["a", "b"], of="lines as JSON")
file("text.json", '"just a text"', ["just a text"])
file("number.json", "5", "it is a number", ANY)
file("empty_list.json", "[]", "No text found")
file("empty_object.json", "{}", ANY)
file("mixed.json", '["a", {"text": "b"}, 7, null, ["c"]]', "row 1", ["b"])
file("column.json", '{"version": 1, "data": [{"text": "a"}], "more": [{"x": 1}]}', ["a"])
BIG = '{"text": "' + "word " * 20_000 + '"}'  # 100 kB
file("big.json", "[" + ",".join([BIG] * 200) + "]", 200, ONCE)
file("big_cut.json", "[" + ",".join([BIG] * 200), "after item 200", ONCE)
file("big_broken.json", "[" + ",".join([BIG] * 190) + ",{]", "after item 190", ONCE)
file("big_object.json", '{"v": [], "data": [' + ",".join([BIG] * 190) + "]}", 190, ONCE)
file("big_deep.json", "[" * (17 * 1024**2), "an item of the list")
file("big_no_list.json", '{"a": "' + "x" * (17 * 1024**2) + '"}', "one large object", ONCE)

# --- tables ---------------------------------------------------------------------------------------

file("open_quote.csv", 'text,n\nfine,1\n"never closed,2\n' + "more,3\n" * 50, "line 3", ["fine"])
file("quote_inside.csv", 'text,n\nfine,1\n"a"b,2\nlast,3\n', "line 3", ["fine", "last"])
file("short_row.csv", "id,text\n1,a\n2\n3,b\n", "row at line 3", ["a", "b"])
file("long_row.csv", "id,text\n1,a,extra,more\n", ["a"])
file(
    "many_columns.csv",
    ",".join(f"c{i}" for i in range(50_000)) + ",text\n" + "," * 50_000 + "a",
    ["a"],
)
file("same_names.csv", "text,text\na,b\n", ["b"])
file("no_names.csv", ",,\n1,2,3\n", ANY)
file("semicolons.csv", "id;text\n1;a, b\n", ["a, b"])
file("numbers.csv", "a,b\n1,2\n", ANY)
file(
    "nul.csv", "text\na\0b and many more words than that\n", ["a\0b and many more words than that"]
)
file("huge_quoted.csv", 'text\n"' + ("line" * 1000 + "\n") * 4500 + '"\nb\n', "larger", ANY)
file("csv.tsv", "id,text\n1,a\n", ANY, of="commas in TSV")
file("quotes.tsv", 'text\n"unclosed\nb\n', "line 2", ANY)
file("binary.csv", b"text\n" + bytes(range(256)) * 9, "not a text file")
