import OpenAI from "openai";

const [url, model, prompt, , length] = process.argv.slice(2);
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: "none", maxRetries: 0 });
const usual = { model, temperature: 0 };
const asked = { ...usual, input: prompt, max_output_tokens: Number(length), reasoning: { effort: "low", summary: "auto" } };

const stepsOf = (response) => {
  const item = response.output.find(({ type }) => type === "reasoning");
  return {
    text: item.content.map(({ text }) => text).join(""),
    steps: item.summary.map(({ text }) => text),
    tokens: response.usage.output_tokens_details.reasoning_tokens,
  };
};

const messages = [{ role: "user", content: prompt }];
const chat = await client.chat.completions.create({ ...usual, messages, max_tokens: Number(length) });
const whole = await client.responses.create(asked);
let last;
const events = [];
for await (const event of client.responses.stream(asked)) {
  events.push(event.type);
  last = event;
}
const { content, reasoning, reasoning_content: older } = chat.choices[0].message;
console.log(
  JSON.stringify({
    chat: [content, reasoning, older],
    response: [whole.output_text, stepsOf(whole)],
    streamed: [last.response.output_text ?? "", stepsOf(last.response)],
    events,
  }),
);
