#!/bin/sh
# go-tools.sh FOLDER: installs the clients that tests run as others wrote them. Without Go, or without the network, the tests
# say in a line what they go without.
folder=$1
command -v go >/dev/null 2>&1 || { echo "no Go: tests go without h2spec, fortio and ghz"; exit 0; }
mkdir -p "$folder"
for module in github.com/summerwind/h2spec/cmd/h2spec@v2.2.1+incompatible fortio.org/fortio@v1.66.5 \
    github.com/bojand/ghz/cmd/ghz@v0.93.0; do
    name=$(basename "${module%@*}")
    [ -x "$folder/$name" ] && continue
    told=$(GOBIN=$(cd "$folder" && pwd) go install "$module" 2>&1) ||
        echo "cannot install $name, tests go without it: $(printf '%s' "$told" | tail -n 1)"
done
