import java.io.ByteArrayOutputStream;
import java.net.URI;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;
import java.net.http.HttpResponse;
import java.nio.charset.StandardCharsets;
import java.nio.file.Files;
import java.nio.file.Path;
import java.time.Duration;
import java.util.UUID;

/** java Ask.java PICTURE QUESTION: prints the service's JSON. Java 17 or later, no library. */
public class Ask {
    public static void main(String[] args) throws Exception {
        String boundary = UUID.randomUUID().toString();
        ByteArrayOutputStream body = new ByteArrayOutputStream();
        write(body, "--" + boundary + "\r\nContent-Disposition: form-data; name=\"prompt\"\r\n\r\n"
            + args[1] + "\r\n--" + boundary
            + "\r\nContent-Disposition: form-data; name=\"image\"; filename=\"picture\"\r\n"
            + "Content-Type: image/*\r\n\r\n");
        body.write(Files.readAllBytes(Path.of(args[0])));
        write(body, "\r\n--" + boundary + "--\r\n");

        HttpRequest request = HttpRequest.newBuilder()
            .uri(URI.create(environment("QWENVL_URL", "http://127.0.0.1:8000") + "/v1/image/recognize"))
            .timeout(Duration.ofSeconds(150))
            .header("Authorization", "Bearer " + environment("QWENVL_API_KEY", "none"))
            .header("Content-Type", "multipart/form-data; boundary=" + boundary)
            .POST(HttpRequest.BodyPublishers.ofByteArray(body.toByteArray()))
            .build();
        HttpClient client = HttpClient.newBuilder().version(HttpClient.Version.HTTP_1_1).build();
        HttpResponse<String> response = client.send(request, HttpResponse.BodyHandlers.ofString());
        System.out.write((response.body() + "\n").getBytes(StandardCharsets.UTF_8));
        System.out.flush();
        System.exit(response.statusCode() == 200 ? 0 : 1);
    }

    private static void write(ByteArrayOutputStream body, String text) throws Exception {
        body.write(text.getBytes(StandardCharsets.UTF_8));
    }

    private static String environment(String name, String fallback) {
        return System.getenv().getOrDefault(name, fallback);
    }
}
