"""Bodies of chat requests that are made to hurt, and the statuses they may be answered with."""


def chat(content: str, **fields: str) -> bytes:
    """A chat request with texts of JSON put in as they are."""
    given = {"model": '"support"', "messages": f'[{{"role":"user","content":{content}}}]', **fields}
    return ("{" + ",".join(f'"{name}":{value}' for name, value in given.items()) + "}").encode()


MANY = "[{}null]"
KEYS = ",".join(f'"{each}":1' for each in range(80_000))
ATTACKS: dict[str, tuple[bytes, set[int]]] = {
    "100 MB": (b" " * 100_000_000, {413}),
    "1e5 messages": (chat('"a"', messages=MANY.format('{"role":"user","content":"hi"},' * 100_000)), {413}),
    "as many messages as fit": (chat('"a"', messages=MANY.format('{"role":"user","content":"a"},' * 30_000)), {400}),
    "as many broken messages as fit": (chat('"a"', messages=MANY.format("{}," * 300_000)), {400}),
    "as many parts as fit": (chat(MANY.format('{"type":"text","text":""},' * 35_000)), {400}),
    "as many stops as fit": (chat('"a"', stop=MANY.format("{}," * 300_000)), {400}),
    "as many keys as fit": (f"{{{KEYS}}}".encode(), {400}),
    "as many keys as fit, one twice": (f'{{{KEYS},"79999":1}}'.encode(), {400}),
    "as much metadata as fits": (chat('"a"', metadata=f"{{{KEYS}}}"), {400}),
    "as many biases as fit": (chat('"a"', logit_bias=f"{{{KEYS.replace(':1', ':999')}}}"), {400}),
    "lists 1e4 deep": (chat('"a"', metadata="[" * 10_000 + "]" * 10_000), {400}),
    "lists 9e5 deep": (b"[" * 900_000, {400}),
    "objects 1e4 deep": (chat('"a"', metadata='{"a":' * 10_000 + "1" + "}" * 10_000), {400}),
    "NaN": (chat('"a"', temperature="NaN"), {400}),
    "Infinity": (chat('"a"', top_p="Infinity"), {400}),
    "-Infinity": (chat('"a"', temperature="-Infinity"), {400}),
    "1e999": (chat('"a"', temperature="1e999"), {400}),
    "an int of 4,000 digits": (chat('"a"', seed="9" * 4_000), {400}),
    "an int of 900,000 digits": (chat('"a"', max_tokens="9" * 900_000), {400}),
    "an int beyond 64 bits": (chat('"a"', seed=str(2**64)), {400}),
    "invalid UTF-8": (chat('"a"').replace(b'"a"', b'"\xff\xfe"'), {400}),
    "overlong UTF-8": (chat('"a"').replace(b'"a"', b'"\xc0\xaf"'), {400}),
    "UTF-16": (chat('"a"').decode().encode("utf-16"), {400}),
    "a key of 900,000 letters": (b'{"' + b"a" * 900_000 + b'":1}', {400}),
    "the same twice": (b'{"' + b"a" * 450_000 + b'":1,"' + b"a" * 450_000 + b'":1}', {400}),
    "a model's name of 900,000 letters": (chat('"a"', model='"' + "a" * 900_000 + '"'), {404}),
    "a duplicate key": (chat('"a"')[:-1] + b',"model":"x"}', {400}),
    "a lone surrogate": (chat(r'"\ud800"'), {400}),
    "a lone surrogate as a key": (chat('"a"', metadata=r'{"\udfff":"x"}'), {400}),
    "a raw NUL": (chat('"a\x00b"'), {400}),
    "NUL alone": (b"\x00" * 1_000, {400}),
    "an escaped NUL as the model": (chat('"a"', model=r'"\u0000"'), {404}),
    "an escaped NUL as the text": (chat(r'"thank\u0000you"', max_tokens="1"), {200}),
    "nothing": (b"", {400}),
}  # fmt: skip
