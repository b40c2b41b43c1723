// go run ask.go PICTURE QUESTION: prints the service's JSON.
package main

import (
	"bytes"
	"fmt"
	"io"
	"mime/multipart"
	"net/http"
	"net/textproto"
	"os"
	"time"
)

func main() {
	picture, err := os.ReadFile(os.Args[1])
	check(err)
	var body bytes.Buffer
	form := multipart.NewWriter(&body)
	check(form.WriteField("prompt", os.Args[2]))
	part, err := form.CreatePart(textproto.MIMEHeader{
		"Content-Disposition": {`form-data; name="image"; filename="picture"`},
		"Content-Type":        {"image/*"},
	})
	check(err)
	_, err = part.Write(picture)
	check(err)
	check(form.Close())

	request, err := http.NewRequest("POST", environment("QWENVL_URL", "http://127.0.0.1:8000")+"/v1/image/recognize", &body)
	check(err)
	request.Header.Set("Content-Type", form.FormDataContentType())
	request.Header.Set("Authorization", "Bearer "+environment("QWENVL_API_KEY", "none"))
	client := http.Client{Timeout: 150 * time.Second}
	response, err := client.Do(request)
	check(err)
	defer response.Body.Close()
	answer, err := io.ReadAll(response.Body)
	check(err)
	fmt.Println(string(answer))
	if response.StatusCode != http.StatusOK {
		os.Exit(1)
	}
}

func environment(name, fallback string) string {
	if value := os.Getenv(name); value != "" {
		return value
	}
	return fallback
}

func check(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}
