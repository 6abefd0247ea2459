// The source of all data: the server that served this page. Three calls (live, chat, explain), and the API key.
// EventSource cannot send a header, so both streams are read with fetch and one parser of server-sent events.

const ROOT = new URL('.', document.baseURI); // relative, so that a path prefix of a proxy is kept
const SILENCE_MS = 40_000; // the server sends at least a comment each 15 s; after this the connection is dead
const KEY = 'penstock-api-key';

let key = read();
let unlock = null; // called when a key was given

function read() { try { return sessionStorage.getItem(KEY) || ''; } catch { return ''; } }

export function setKey(text) {
  key = text.trim();
  try { sessionStorage.setItem(KEY, key); } catch { /* storage is off: the key lives as long as the page */ }
  unlock?.();
}

export const hasKey = () => key !== '';

export class ServerError extends Error {
  constructor(status, message) { super(message); this.status = status; }
}

async function ask(path, options = {}) {
  const headers = { ...options.headers, ...(key ? { authorization: `Bearer ${key}` } : {}) };
  let response;
  try {
    response = await fetch(new URL(path, ROOT), { cache: 'no-store', ...options, headers });
  } catch (error) {
    if (error.name === 'AbortError') throw error;
    throw new ServerError(0, 'the server does not answer');
  }
  if (response.ok) return response;
  let message = `${response.status} ${response.statusText}`;
  try {
    message = (await response.json()).error.message || message;
  } catch { /* not in our shape: the status says it */ }
  throw new ServerError(response.status, message);
}

// Yields {event, data} from a response; `alive` is called whenever bytes arrive.
async function* events(response, alive = () => {}) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = '', event = 'message', data = [];
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      alive();
      const lines = (rest + value).split('\n');
      rest = lines.pop();
      for (const raw of lines) {
        const line = raw.endsWith('\r') ? raw.slice(0, -1) : raw;
        if (line === '') {
          if (data.length) yield { event, data: data.join('\n') };
          event = 'message'; data = [];
        } else if (line.startsWith('data:')) data.push(line.slice(line[5] === ' ' ? 6 : 5));
        else if (line.startsWith('event:')) event = line.slice(6).trim();
      }
    }
  } finally { reader.cancel().catch(() => {}); }
}

const sleep = seconds => new Promise(done => setTimeout(done, seconds * 1e3));
const visible = () => new Promise(done => {
  if (!document.hidden) { done(); return; }
  const look = () => { if (!document.hidden) { document.removeEventListener('visibilitychange', look); done(); } };
  document.addEventListener('visibilitychange', look);
});

async function stage() { // how far loading is; /health is 503 meanwhile, and says so
  try {
    const health = await (await fetch(new URL('health', ROOT), { cache: 'no-store' })).json();
    if (health.status !== 'loading') return '';
    const share = typeof health.progress === 'number' ? `, ${Math.round(100 * health.progress)} %` : '';
    return `the model is loading: ${health.stage}${share}`;
  } catch { return ''; }
}

// Listens for ever. onState gets 'live', 'retrying', 'stopped' or 'locked', and a sentence for people.
export async function listen(onHello, onSnapshot, onState) {
  let wait = .5;
  for (;;) {
    await visible(); // a hidden tab does not listen
    const stop = new AbortController();
    const hide = () => { if (document.hidden) stop.abort(); };
    document.addEventListener('visibilitychange', hide);
    let watchdog = 0, state = 'retrying', why = 'the connection was closed';
    const alive = () => { clearTimeout(watchdog); watchdog = setTimeout(() => stop.abort(), SILENCE_MS); };
    try {
      alive();
      const response = await ask('live', { signal: stop.signal });
      for await (const { event, data } of events(response, alive)) {
        if (event === 'hello') { onHello(JSON.parse(data)); onState('live', ''); wait = .5; }
        else if (event === 'snapshot') onSnapshot(JSON.parse(data));
        else if (event === 'bye') { state = 'stopped'; why = 'the server has stopped'; break; }
      }
    } catch (error) {
      if (error instanceof ServerError) why = error.message;
      if (error.status === 401) { state = 'locked'; why = 'the server wants an API key'; }
      if (error.status === 503) why = await stage() || why;
    }
    clearTimeout(watchdog);
    document.removeEventListener('visibilitychange', hide);
    if (document.hidden) continue;
    onState(state, why);
    if (state === 'locked') await new Promise(done => { unlock = done; });
    else { await sleep(wait); wait = Math.min(5, wait * 2); }
  }
}

// One request's record, or null where the server does not know it (any more).
export async function explain(id) {
  try { return await (await ask(`explain/${encodeURIComponent(id)}`)).json(); } catch { return null; }
}

// Streams an answer: {id} first, then {delta} and at last {finish, usage}. Throws ServerError, or AbortError.
export async function* chat(body, signal) {
  const own = [...crypto.getRandomValues(new Uint8Array(16))].map(x => x.toString(16).padStart(2, '0')).join('');
  const response = await ask('v1/chat/completions', {
    method: 'POST', signal, body: JSON.stringify(body),
    headers: { 'content-type': 'application/json', 'x-request-id': own },
  });
  yield { id: response.headers.get('x-request-id') || own };
  let finish = null, usage = null;
  for await (const { data } of events(response)) {
    if (data === '[DONE]') break;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ServerError(chunk.error.code || 500, chunk.error.message);
    usage = chunk.usage || usage;
    const choice = chunk.choices?.[0];
    if (choice?.delta?.content) yield { delta: choice.delta.content };
    finish = choice?.finish_reason || finish;
  }
  yield { finish, usage };
}
