// What a request is, and how it looks in curl, Python and OpenAI's client.

// Names of a template's fields, each once; `{{` and `}}` are braces.
export function fieldsOf(template) {
  if (template === null || template === undefined) return [];
  return [...new Set([...template.matchAll(/\{\{|\}\}|\{([^{}]*)\}/g)].map((match) => match[1]).filter(Boolean))];
}

export function bodyOf(reference, inputs, parameters) {
  const body = reference ? { task_id: reference, inputs } : { inputs };
  return Object.keys(parameters).length ? { ...body, parameters } : body;
}

export function snippets(origin, body, hasKey, model) {
  const chat = snippetOpenAI(origin, body, hasKey, model);
  return { curl: snippetCurl(origin, body, hasKey), Python: snippetPython(origin, body, hasKey), ...(chat ? { OpenAI: chat } : {}) };
}

export function snippetCurl(origin, body, hasKey) {
  const key = hasKey ? ` \\\n     -H "authorization: Bearer $PROMPTPLEX_KEY"` : "";
  return `curl ${origin}generate \\\n     -H 'content-type: application/json'${key} \\\n     -d '${JSON.stringify(body).replaceAll("'", "'\\''")}'`;
}

function snippetPython(origin, body, hasKey) {
  const key = hasKey ? `, "authorization": f"Bearer {os.environ['PROMPTPLEX_KEY']}"` : "";
  return `import json${hasKey ? "\nimport os" : ""}
from urllib.request import Request, urlopen

body = ${python(body)}
headers = {"content-type": "application/json"${key}}
with urlopen(Request("${origin}generate", json.dumps(body).encode(), headers)) as response:
    print(json.load(response)["generated_text"])`;
}

function snippetOpenAI(origin, { task_id: task, inputs, parameters = {} }, hasKey, model) {
  if (typeof inputs !== "string" || parameters.choices) return null;  // not in OpenAI's shapes
  const more = [parameters.max_new_tokens && `max_tokens=${parameters.max_new_tokens}`, `temperature=${parameters.do_sample ? parameters.temperature : 0}`, parameters.seed !== undefined && `seed=${parameters.seed}`];
  const key = hasKey ? `os.environ["PROMPTPLEX_KEY"]` : `"none"`;
  return `${hasKey ? "import os\n\n" : ""}from openai import OpenAI

client = OpenAI(base_url="${origin}v1", api_key=${key})
answer = client.completions.create(model=${quoted(task ?? model)}, prompt=${quoted(inputs)}, ${more.filter(Boolean).join(", ")})
print(answer.choices[0].text)`;
}

function quoted(text) {
  return JSON.stringify(text);  // a JSON string is a Python string
}

function python(value) {
  if (value === null) return "None";
  if (typeof value === "boolean") return value ? "True" : "False";
  if (Array.isArray(value)) return `[${value.map(python).join(", ")}]`;
  if (typeof value === "object") return `{${Object.entries(value).map(([name, each]) => `${quoted(name)}: ${python(each)}`).join(", ")}}`;
  return JSON.stringify(value);
}
