import java.net.URI;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;
import java.net.http.HttpResponse;
import java.util.ArrayList;
import java.util.List;
import java.util.regex.Matcher;
import java.util.regex.Pattern;
import java.util.stream.Collectors;

/** The JDK's own client as it is: every POST asks for an upgrade to HTTP/2. Prints the bodies of answers. */
public class HttpClientProgram {
    private static final HttpClient CLIENT = HttpClient.newHttpClient();

    public static void main(String[] given) throws Exception {
        String url = given[0], model = given[1], prompt = given[2];
        List<String> turns = List.of(given).subList(3, given.length);
        String asked = "\"max_tokens\":8,\"temperature\":0";
        String completion = "{\"model\":\"" + model + "\",\"prompt\":\"" + prompt + "\"," + asked;
        String generate = post(url + "/v1/completions", completion + "}").body();
        String stream = post(url + "/v1/completions", completion + ",\"stream\":true}").body().lines()
                .filter(line -> line.startsWith("data: {"))
                .map(line -> line.substring(6))
                .collect(Collectors.joining(","));
        HttpResponse<String> lost = post(url + "/v1/completions", "{\"model\":\"nothing\",\"prompt\":\"a\"}");

        List<String> answers = new ArrayList<>();
        String messages = "";
        for (String turn : turns) {
            messages += "{\"role\":\"user\",\"content\":\"" + turn + "\"}";
            String chat = "{\"model\":\"" + model + "\",\"messages\":[" + messages + "]," + asked + "}";
            String answer = post(url + "/v1/chat/completions", chat).body();
            answers.add(answer);
            Matcher message = Pattern.compile("\"message\":(\\{.*?\\}),\"logprobs\"").matcher(answer);
            message.find();
            messages += "," + message.group(1) + ",";
        }
        System.out.println("{\"generate\":" + generate + ",\"stream\":[" + stream + "],\"turns\":["
                + String.join(",", answers) + "],\"status\":" + lost.statusCode()
                + ",\"error\":" + lost.body() + "}");
    }

    private static HttpResponse<String> post(String url, String body) throws Exception {
        HttpRequest request = HttpRequest.newBuilder(URI.create(url))
                .header("content-type", "application/json")
                .POST(HttpRequest.BodyPublishers.ofString(body))
                .build();
        return CLIENT.send(request, HttpResponse.BodyHandlers.ofString());
    }
}
