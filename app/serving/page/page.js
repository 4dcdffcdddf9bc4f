// The chat page: a client of the same API that every other client uses.
// Whatever a server or a model wrote reaches the page as text, never as HTML.

const KEY_NAME = "rayloop.key";
const READY_POLL_MS = 30_000;
const NOT_READY_POLL_MS = 5_000;
const READY_TIMEOUT_MS = 4_000;
const FOLLOW_PX = 80; // this near to the end, the view follows the answer
const WHY_MAX_DEPTH = 12; // deeper values are shown as JSON

const at = (id) => document.getElementById(id);
const scroller = at("scroller");
const transcript = at("transcript");
const welcome = at("welcome");
const input = at("message-input");
const sendButton = at("send-button");
const stopButton = at("stop-button");
const keyDialog = at("key-dialog");
const keyInput = at("key-input");

let turns = []; // {question, answer}; answer is null until the server has given one
let running = null; // the AbortController of the answer being streamed
let modelId = null;
let following = true;

// ---------------------------------------------------------------- errors

/** Something the reader should know: `message` is a sentence to show. */
class ChatError extends Error {
  constructor(message, reference = null) {
    super(message);
    this.reference = reference;
  }
}

const UNREACHABLE = "The server cannot be reached. Check the connection and try again.";
const CUT_SHORT = "The connection ended before the answer was complete.";

/** The sentence in an error of OpenAI's shape, or `otherwise`. */
function sentenceOf(body, otherwise) {
  const said = body?.error?.message ?? body?.error;
  if (typeof said !== "string" || said.trim() === "") return otherwise;
  return /[.!?…)]$/.test(said.trim()) ? said.trim() : `${said.trim()}.`;
}

/** The ChatError for a response that is not a success. Reads the body. */
async function errorOf(response) {
  const body = await response.json().catch(() => null);
  let sentence = sentenceOf(body, `The server answered with status ${response.status}.`);
  const waitS = Number(response.headers.get("retry-after"));
  if (waitS > 0) sentence += ` Try again in ${Math.ceil(waitS)} s.`;
  return new ChatError(sentence, response.headers.get("x-request-id"));
}

// ---------------------------------------------------------------- the key

// A browser can forbid storage; the key then lives as long as the page.
let keyInMemory = null;

function storedKey() {
  try {
    return sessionStorage.getItem(KEY_NAME) ?? keyInMemory;
  } catch {
    return keyInMemory;
  }
}

function storeKey(key) {
  keyInMemory = key;
  try {
    if (key === null) sessionStorage.removeItem(KEY_NAME);
    else sessionStorage.setItem(KEY_NAME, key);
  } catch {
    // keyInMemory has it
  }
}

/** A header carries visible ASCII; anything else is a slip of the clipboard. */
const isKey = (key) => /^[\x21-\x7e]+$/.test(key);

/** Moves a key from `#key=...` to the session. A fragment never leaves the browser, and this one leaves the address bar. */
function takeKeyFromFragment() {
  const found = /(?:^#|&)key=([^&]*)/.exec(location.hash);
  if (!found) return false;
  history.replaceState(null, "", location.pathname + location.search);
  let key = found[1];
  try {
    key = decodeURIComponent(key);
  } catch {
    // a bare "%" in a key: take it as it stands
  }
  if (!isKey(key)) return false;
  storeKey(key);
  return true;
}

let askedKey = null; // the open dialog's promise: callers share one dialog

/** The key the reader enters, or null when they decline. */
function askForKey(problem) {
  askedKey ??= new Promise((resolve) => {
    showKeyProblem(problem);
    keyInput.value = "";
    keyDialog.returnValue = "";
    keyDialog.addEventListener("close", () => {
      askedKey = null;
      resolve(keyDialog.returnValue === "given" ? storedKey() : null);
    }, { once: true });
    keyDialog.showModal();
    keyInput.focus();
  });
  return askedKey;
}

function showKeyProblem(problem) {
  at("key-problem").textContent = problem ?? "";
  at("key-problem").hidden = !problem;
}

function onKeySubmit(event) {
  event.preventDefault();
  const key = keyInput.value.trim();
  if (!isKey(key)) {
    showKeyProblem("A key has only letters, digits and signs, without spaces or accents.");
    keyInput.focus();
    return;
  }
  storeKey(key);
  keyInput.value = "";
  keyDialog.close("given");
  pollReadiness();
}

// ---------------------------------------------------------------- the API

/** A successful response. Asks for the key when there is none or the server refuses it. */
async function call(path, { method = "GET", body, signal } = {}) {
  let problem = null;
  for (;;) {
    const key = storedKey() ?? (await askForKey(problem));
    if (key === null) throw new ChatError("An API key is needed to get an answer.");
    const headers = { Authorization: `Bearer ${key}` };
    if (body !== undefined) headers["Content-Type"] = "application/json";
    const response = await fetch(path, { method, headers, signal, body: JSON.stringify(body), cache: "no-store" })
      .catch((error) => { throw error.name === "AbortError" ? error : new ChatError(UNREACHABLE); });
    if (response.ok) return response;
    const error = await errorOf(response);
    if (response.status !== 401) throw error;
    // Another call may have brought a new key meanwhile: forget only the refused one.
    if (storedKey() === key) storeKey(null);
    problem = error.message;
  }
}

/** The first model the server lists; asked once. */
async function currentModel(signal) {
  if (modelId === null) {
    const list = await (await call("/v1/models", { signal })).json().catch(() => null);
    modelId = list?.data?.[0]?.id ?? null;
    if (modelId === null) throw new ChatError("The server lists no model. It may still be starting.");
    at("model").textContent = modelId;
  }
  return modelId;
}

/** The data of each server-sent event. Chunks may end anywhere: in a line, a CRLF or a character.
 *
 * Source: WHATWG HTML, 9.2.6 Interpreting an event stream; an event without its blank line is dropped.
 */
async function* eventData(body) {
  const reader = body.getReader();
  const decoder = new TextDecoder();
  let rest = "";
  let data = [];
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const lines = (rest + decoder.decode(value, { stream: true })).split(/\r\n|\n|\r(?!$)/);
      rest = lines.pop(); // no line end yet, or a CR that may be half of a CRLF
      for (const line of lines) {
        if (line.startsWith("data:")) {
          data.push(line.slice(line[5] === " " ? 6 : 5));
        } else if (line === "" && data.length > 0) {
          yield data.join("\n");
          data = [];
        }
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

/** The completion's chunks up to `[DONE]`.
 *
 * Raises ChatError for an error inside the stream and for a stream that stops early.
 */
async function* completionChunks(response) {
  const reference = response.headers.get("x-request-id");
  let finished = false;
  try {
    for await (const data of eventData(response.body)) {
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new ChatError(sentenceOf(chunk, "The server could not finish the answer."), reference);
      finished ||= Boolean(chunk.choices?.[0]?.finish_reason);
      yield chunk;
    }
  } catch (error) {
    if (error instanceof SyntaxError) throw new ChatError("The server sent something that is not an answer.", reference);
    throw error instanceof TypeError ? new ChatError(CUT_SHORT, reference) : error;
  }
  if (!finished) throw new ChatError(CUT_SHORT, reference);
}

// ---------------------------------------------------------------- one exchange

/** What is sent: the answered turns and the question. A refused question would be refused again in every later request. */
function messagesFor(turn) {
  const messages = [];
  for (const { question, answer } of turns) {
    if (answer === null) continue;
    messages.push({ role: "user", content: question }, { role: "assistant", content: answer });
  }
  messages.push({ role: "user", content: turn.question });
  return messages;
}

function send(question) {
  if (running || question.trim() === "") return;
  for (const button of transcript.querySelectorAll(".retry")) button.hidden = true;
  welcome.hidden = true;
  const message = cloneOf("user-template");
  message.querySelector(".message-text").textContent = question;
  transcript.append(message);
  const turn = { question, answer: null };
  turns.push(turn);
  following = true;
  answer(turn);
}

/** Streams the answer to `turn` into a new message and leaves it done, stopped or in error. */
async function answer(turn) {
  const message = cloneOf("assistant-template");
  transcript.append(message);
  follow();
  const controller = new AbortController();
  setRunning(controller);
  try {
    const finishReason = await stream(turn, message, controller.signal);
    if (finishReason === "length") remark(message, "The answer reached its length limit.");
    if (finishReason === "content_filter") remark(message, "The answer was withheld by a content rule.");
    turn.answer = textOf(message);
    message.dataset.state = "done";
    offerTools(message);
  } catch (error) {
    if (error.name === "AbortError") {
      turn.answer = textOf(message) || null;
      message.dataset.state = "stopped";
      remark(message, "You stopped this answer.");
    } else {
      message.dataset.state = "error";
      offerRetry(message, turn, error);
    }
  } finally {
    message.removeAttribute("aria-busy");
    if (running === controller) setRunning(null);
    follow();
  }
}

/** Fills `message` while the server writes and returns the finish reason. */
async function stream(turn, message, signal) {
  const model = await currentModel(signal);
  const response = await call("/v1/chat/completions", {
    method: "POST", signal, body: { model, messages: messagesFor(turn), stream: true },
  });
  const text = message.querySelector(".message-text");
  let finishReason = null;
  for await (const chunk of completionChunks(response)) {
    if (chunk.id) message.dataset.responseId = chunk.id;
    const choice = chunk.choices?.[0];
    if (choice?.delta?.content) text.append(choice.delta.content);
    finishReason = choice?.finish_reason ?? finishReason;
    if (chunk.rayloop?.handover) showHandover(message, chunk.rayloop.reason);
    follow();
  }
  text.normalize();
  return finishReason;
}

function setRunning(controller) {
  running = controller;
  stopButton.hidden = controller === null;
  sendButton.hidden = controller !== null;
  focusInput(); // the hidden button would take the focus with it
}

/** Puts the cursor in the field, but not on a phone, where the keyboard would cover the answer. */
function focusInput() {
  if (matchMedia("(pointer: fine)").matches) input.focus();
}

function newConversation() {
  running?.abort();
  setRunning(null);
  turns = [];
  transcript.replaceChildren();
  welcome.hidden = false;
  scroller.scrollTop = 0;
}

// ---------------------------------------------------------------- the parts of a message

const cloneOf = (id) => at(id).content.firstElementChild.cloneNode(true);

const textOf = (message) => message.querySelector(".message-text").textContent;

function follow() {
  if (following) scroller.scrollTop = scroller.scrollHeight;
}

function remark(message, sentence) {
  const note = message.querySelector(".remark");
  note.textContent = sentence;
  note.hidden = false;
}

function showHandover(message, reason) {
  const words = typeof reason === "string" ? reason.replaceAll("_", " ").trim() : "";
  message.querySelector(".handover-reason").textContent = words;
  message.querySelector(".handover").hidden = false;
}

function offerRetry(message, turn, error) {
  if (!(error instanceof ChatError)) console.error(error);
  modelId = null; // the failure may be a model that is gone
  const known = error instanceof ChatError;
  message.querySelector(".failure-text").textContent = known ? error.message : "Something went wrong on this page.";
  const reference = message.querySelector(".failure-reference");
  reference.textContent = `Reference: ${error.reference}`;
  reference.hidden = !error.reference;
  message.querySelector(".retry").addEventListener("click", () => {
    if (running) return;
    message.remove();
    following = true;
    answer(turn);
  });
  message.querySelector(".failure").hidden = false;
}

/** Feedback and the reasons, for an answer the server can look up. */
function offerTools(message) {
  if (!message.dataset.responseId) return;
  for (const button of message.querySelectorAll("[data-rating]")) {
    button.addEventListener("click", () => rate(message, button));
  }
  message.querySelector(".why-button").addEventListener("click", () => toggleWhy(message));
  message.querySelector(".tools").hidden = false;
}

async function rate(message, pressed) {
  const buttons = [...message.querySelectorAll("[data-rating]")];
  const acknowledgement = message.querySelector(".acknowledgement");
  if (acknowledgement.dataset.pending) return;
  acknowledgement.dataset.pending = "true";
  const body = { response_id: message.dataset.responseId, rating: Number(pressed.dataset.rating), comment: null };
  try {
    await call("/v1/feedback", { method: "POST", body });
    for (const button of buttons) button.setAttribute("aria-pressed", String(button === pressed));
    acknowledgement.textContent = "Thank you for the feedback.";
    acknowledgement.classList.remove("wrong");
  } catch (error) {
    acknowledgement.textContent = error.message;
    acknowledgement.classList.add("wrong");
  } finally {
    delete acknowledgement.dataset.pending;
  }
}

async function toggleWhy(message) {
  const button = message.querySelector(".why-button");
  const panel = message.querySelector(".why");
  const opens = panel.hidden;
  button.setAttribute("aria-expanded", String(opens));
  panel.hidden = !opens;
  if (!opens) return;
  panel.textContent = "Loading…";
  try {
    const response = await call(`/v1/why/${encodeURIComponent(message.dataset.responseId)}`);
    panel.replaceChildren(described(parseExactly(await response.text())));
  } catch (error) {
    panel.textContent = error instanceof ChatError ? error.message : "The reasons could not be read.";
  }
  panel.tabIndex = 0; // a panel that scrolls must be reachable by keyboard
  panel.scrollIntoView({ block: "nearest" });
}

/** JSON with its numbers as written: a table's snapshot id has 64 bits, a JavaScript number 53. */
function parseExactly(json) {
  return JSON.parse(json, (_, value, context) => (typeof value === "number" ? context?.source ?? value : value));
}

/** A value as text or, for an object or array, an indented definition list. */
function described(value, depth = 0) {
  if (value === null || value === "") return "none";
  if (typeof value === "boolean") return value ? "yes" : "no";
  if (typeof value !== "object") return String(value);
  if (depth >= WHY_MAX_DEPTH) return JSON.stringify(value);
  const entries = Array.isArray(value) ? value.map((item, i) => [String(i + 1), item]) : Object.entries(value);
  if (entries.length === 0) return "none";
  const list = document.createElement("dl");
  for (const [name, item] of entries) {
    const pair = document.createElement("div");
    const term = document.createElement("dt");
    const detail = document.createElement("dd");
    term.textContent = name.replaceAll("_", " ");
    detail.append(described(item, depth + 1));
    pair.className = detail.firstElementChild ? "pair group" : "pair";
    pair.append(term, detail);
    list.append(pair);
  }
  return list;
}

// ---------------------------------------------------------------- the status

let pollTimer = null;

const STATUS_TEXT = { ready: "Ready", locked: "Key needed", starting: "Not ready", unreachable: "Unreachable" };

async function readiness() {
  const key = storedKey();
  const headers = key === null ? {} : { Authorization: `Bearer ${key}` };
  try {
    const response = await fetch("/ready", { headers, cache: "no-store", signal: AbortSignal.timeout(READY_TIMEOUT_MS) });
    if (response.status === 401 || response.status === 403) return "locked";
    return response.ok ? "ready" : "starting";
  } catch {
    return "unreachable";
  }
}

async function pollReadiness() {
  clearTimeout(pollTimer);
  if (document.hidden) return; // visibilitychange starts it again
  const state = await readiness();
  const status = at("status");
  if (status.dataset.state !== state) {
    status.dataset.state = state;
    at("status-text").textContent = STATUS_TEXT[state];
    if (state === "ready" && storedKey() !== null) currentModel().catch(() => {});
  }
  clearTimeout(pollTimer);
  pollTimer = setTimeout(pollReadiness, state === "ready" ? READY_POLL_MS : NOT_READY_POLL_MS);
}

// ---------------------------------------------------------------- start

function fitInput() {
  input.style.height = "auto";
  input.style.height = `${input.scrollHeight}px`;
  sendButton.disabled = input.value.trim() === "";
}

function submitInput() {
  if (running || input.value.trim() === "") return;
  const question = input.value.trim();
  input.value = "";
  fitInput();
  send(question);
}

/** Learns the model's name for the header; a failure here is told when a question is asked. */
function greet() {
  currentModel().catch(() => {});
  pollReadiness();
}

at("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  submitInput();
});
input.addEventListener("input", fitInput);
input.addEventListener("keydown", (event) => {
  // While an input method composes, Enter picks a candidate; Safari tells only by key code 229.
  if (event.key !== "Enter" || event.shiftKey || event.isComposing || event.keyCode === 229) return;
  event.preventDefault();
  submitInput();
});
stopButton.addEventListener("click", () => running?.abort());
at("new-button").addEventListener("click", newConversation);
for (const button of document.querySelectorAll(".suggestion")) {
  button.addEventListener("click", () => send(button.textContent));
}
at("key-form").addEventListener("submit", onKeySubmit);
at("key-cancel").addEventListener("click", () => keyDialog.close());
scroller.addEventListener("scroll", () => {
  following = scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < FOLLOW_PX;
});
addEventListener("hashchange", () => {
  if (takeKeyFromFragment()) greet();
});
document.addEventListener("visibilitychange", pollReadiness);

takeKeyFromFragment();
fitInput();
focusInput();
greet();
