import OpenAI from "openai";

const [url, model, prompt, turns] = process.argv.slice(2);
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: "none", maxRetries: 0 });
const asked = { model, max_tokens: 8, temperature: 0 };

const messages = [];
const said = [];
for (const turn of JSON.parse(turns)) {
  messages.push({ role: "user", content: turn });
  const reply = await client.chat.completions.create({ messages, ...asked });
  messages.push(reply.choices[0].message);
  said.push(reply.choices[0].message.content);
}

let stream = "";
for await (const chunk of await client.completions.create({ prompt, stream: true, ...asked })) {
  stream += chunk.choices[0].text;
}

let error = ["none", ""];
try {
  await client.completions.create({ model: "nothing", prompt });
} catch (failure) {
  error = [failure.constructor.name, failure.message];
}

const generate = (await client.completions.create({ prompt, ...asked })).choices[0].text;
console.log(JSON.stringify({ generate, stream, error, turns: said }));
