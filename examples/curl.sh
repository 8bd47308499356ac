#!/bin/sh
# Ask with curl: sh examples/curl.sh [URL]
set -eu
url=${1:-http://127.0.0.1:8080}
scene=benchmarks/scenes/new_003.webp

# An image with its question.
curl -sS --fail-with-body -F image=@$scene -F question='what character is on the pink square?' "$url/v1/vqa"
echo

# An answer as it is written (server-sent events).
curl -sSN --fail-with-body -F image=@$scene -F question='describe the image.' -F stream=true "$url/v1/vqa"

# An image once, then a batch of questions by its id. Each result is a line.
id=$(curl -sS --fail-with-body --data-binary @$scene "$url/v1/images" | sed 's/.*"id":"\([^"]*\)".*/\1/')
curl -sSN --fail-with-body -H 'content-type: application/jsonl' "$url/v1/vqa/batch" --data-binary @- <<END
{"image": "$id", "question": "how many objects are there?"}
{"image": "$id", "question": "what color is the triangle?"}
END
