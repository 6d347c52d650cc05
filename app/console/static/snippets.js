// The same request in other programs: curl, plain Python and OpenAI's client.

// Names of a template's fields, each once; `{{` and `}}` are braces.
export function fieldsOf(template) {
  if (template === null || template === undefined) return [];
  return [...new Set([...template.matchAll(/\{\{|\}\}|\{([^{}]*)\}/g)].map((match) => match[1]).filter(Boolean))];
}

export function bodyOf(reference, inputs, parameters) {
  const body = reference ? { task_id: reference, inputs } : { inputs };
  return Object.keys(parameters).length ? { ...body, parameters } : body;
}

// `program`: whether the answer has `steps`, and whether it has `ballots`.
export function snippets(origin, body, hasKey, model, program) {
  const openAI = snippetOpenAI(origin, body, hasKey, model, program);
  return { curl: snippetCurl(origin, body, hasKey), Python: snippetPython(origin, "generate", body, hasKey, readings(body, program)), ...(openAI ? { OpenAI: openAI } : {}) };
}

export function decisionSnippets(origin, body, hasKey) {
  const readings = ["for each in answer[\"answers\"]:", "    print(each)"];
  return { curl: snippetCurl(origin, body, hasKey, "v1/decisions"), Python: snippetPython(origin, "v1/decisions", body, hasKey, readings), OpenAI: snippetDecisions(origin, body, hasKey) };
}

export function snippetCurl(origin, body, hasKey, path = "generate") {
  const key = hasKey ? ` \\\n     -H "authorization: Bearer $PROMPTPLEX_KEY"` : "";
  return `curl ${origin}${path} \\\n     -H 'content-type: application/json'${key} \\\n     -d '${JSON.stringify(body).replaceAll("'", "'\\''")}'`;
}

function snippetPython(origin, path, body, hasKey, readings) {
  const key = hasKey ? `, "authorization": f"Bearer {os.environ['PROMPTPLEX_KEY']}"` : "";
  return `import json${hasKey ? "\nimport os" : ""}
from urllib.request import Request, urlopen

body = ${python(body)}
headers = {"content-type": "application/json"${key}}
with urlopen(Request("${origin}${path}", json.dumps(body).encode(), headers)) as response:
    answer = json.load(response)
${readings.join("\n")}`;
}

// Lines of Python that print what an answer of /generate has.
function readings({ parameters = {} }, { steps, ballots }) {
  const lines = [];
  if (parameters.choices) lines.push(`print(answer["choice"]["probabilities"], answer["choice"]["label_mass"])`);
  else if (ballots) lines.push(`for ballot in answer["vote"]["ballots"]:`, `    print(ballot["index"], ballot["answer"])`);
  else if (steps) lines.push(`for step in answer["reasoning"]["steps"]:`, `    print("-", step)`);
  return [...lines, `print(answer["generated_text"])`];
}

function snippetOpenAI(origin, { task_id: task, inputs, parameters = {} }, hasKey, model, { steps, ballots }) {
  if (typeof inputs !== "string" || parameters.choices) return null;  // not in OpenAI's shapes
  const { vote, paraphrase, reasoning_effort: effort } = parameters;
  const extra = { ...(vote && { vote }), ...(paraphrase !== undefined && { paraphrase }), ...(effort && !steps && { reasoning_effort: effort }) };
  const given = [
    `model=${quoted(task ?? model)}`,
    steps ? `messages=[{"role": "user", "content": ${quoted(inputs)}}]` : `prompt=${quoted(inputs)}`,
    parameters.max_new_tokens && `max_tokens=${parameters.max_new_tokens}`,
    parameters.do_sample ? `temperature=${parameters.temperature}` : !ballots && "temperature=0",
    parameters.seed !== undefined && `seed=${parameters.seed}`,
    effort && steps && `reasoning_effort=${quoted(effort)}`,
    Object.keys(extra).length && `extra_body=${python(extra)}`,
  ];
  const lines = [
    steps && `print(getattr(choice.message, "reasoning_content", ""))`,
    ballots && `print(f"{choice.vote['share']:.0%} of the ballots")`,
    steps ? "print(choice.message.content)" : "print(choice.text)",
  ];
  return `${client(origin, hasKey)}
answer = client.${steps ? "chat.completions" : "completions"}.create(
    ${given.filter(Boolean).join(",\n    ")},
)
choice = answer.choices[0]
${lines.filter(Boolean).join("\n")}`;
}

function snippetDecisions(origin, { model, input, questions }, hasKey) {
  return `${client(origin, hasKey)}
decision = client.decisions.create(
    model=${quoted(model)},
    input=${quoted(input)},
    questions=[
        ${questions.map(python).join(",\n        ")},
    ],
)
for answer in decision.answers:
    print(answer.type, answer.model_dump())`;
}

function client(origin, hasKey) {
  const key = hasKey ? `os.environ["PROMPTPLEX_KEY"]` : `"none"`;
  return `${hasKey ? "import os\n\n" : ""}from openai import OpenAI

client = OpenAI(base_url="${origin}v1", api_key=${key})`;
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
