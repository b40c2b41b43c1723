#!/bin/sh
# ./ask.sh PICTURE QUESTION: prints the service's JSON. curl asks again on 503, after Retry-After.
set -eu
curl --silent --show-error --fail-with-body --retry 5 --max-time 150 \
    -H "Authorization: Bearer ${QWENVL_API_KEY:-none}" \
    -F "image=@\"$1\";type=image/*" --form-string "prompt=$2" \
    "${QWENVL_URL:-http://127.0.0.1:8000}/v1/image/recognize"
