#!/usr/bin/env bash
# Download the bags below a prefix of an Azure Blob container, check that they arrived, then run COMMAND, if given.
#
#   export AZURE_STORAGE_ACCOUNT=... AZURE_STORAGE_SAS=... AZURE_BLOB_CONTAINER=datasets \
#       AZURE_BLOB_PREFIX=houston_recordings/ BLOB_DEST_DIR=/data/rosbags
#   bash download-blob.sh [COMMAND...]
#
# The SAS needs the permissions Read and List. Without one, azcopy logs in with the pod's workload identity, or as
# AZCOPY_AUTO_LOGIN_TYPE says. AZURE_BLOB_ENDPOINT replaces https://ACCOUNT.blob.core.windows.net (other clouds, tests).
# BLOB_TIMEOUT_S bounds the download, BLOB_STALL_S the time without a byte, BLOB_CONNECT_S an answer. A rerun fetches
# only what is missing.
#
# Exit codes: 0 every blob is there, 1 a rerun would fail alike, 75 it may not (network, server, a signal).
# No secret is ever printed or stands in a process's arguments; COMMAND does not get the SAS.
set -euo pipefail

timeout_s=${BLOB_TIMEOUT_S:-21600}
stall_s=${BLOB_STALL_S:-300}
connect_s=${BLOB_CONNECT_S:-20}

fail() { # exit code, message
  echo "error: download-blob: $2" >&2
  exit "$1"
}

# -- what is asked for --------------------------------------------------------------------------------------------

for name in timeout_s stall_s connect_s; do
  [[ ${!name} =~ ^[1-9][0-9]{0,8}$ ]] ||
    fail 1 "BLOB_${name^^}: found '${!name}', expected a whole number of seconds, for example 21600 (six hours)"
done
base_hint="or train on recordings that OSMO uploads: osmo workflow submit osmo/osmo-workflow.yaml (README.md)"
for name in AZURE_STORAGE_ACCOUNT_KEY AZURE_STORAGE_KEY; do
  [[ -z ${!name:-} ]] || fail 1 "$name is set, but azcopy takes no account key: make a SAS with Read and List \
(az storage container generate-sas --permissions rl) and give it as AZURE_STORAGE_SAS"
done
account=${AZURE_STORAGE_ACCOUNT:-} container=${AZURE_BLOB_CONTAINER:-} prefix=${AZURE_BLOB_PREFIX:-}
account=${account//[[:space:]]/}
[[ -n $account || -n ${AZURE_BLOB_ENDPOINT:-} ]] ||
  fail 1 "AZURE_STORAGE_ACCOUNT is empty; expected the storage account's name; set the credential, $base_hint"
[[ -n $container ]] || fail 1 "AZURE_BLOB_CONTAINER is empty; expected the container's name, for example datasets"
[[ -n ${BLOB_DEST_DIR:-} ]] || fail 1 "BLOB_DEST_DIR is empty; expected the folder to download to"
dest=$BLOB_DEST_DIR
prefix=${prefix%/}
endpoint=${AZURE_BLOB_ENDPOINT:-https://$account.blob.core.windows.net}
endpoint=${endpoint%/}
where="$endpoint/$container/$prefix"

# With a carriage return at its end, as a file from Windows has one, azcopy would crash and print the SAS.
sas=${AZURE_STORAGE_SAS:-}
sas=${sas//[[:space:]]/}
sas=${sas#\?}
unset AZURE_STORAGE_SAS
if [[ -n $sas ]]; then
  [[ $sas == *sig=* ]] || fail 1 "AZURE_STORAGE_SAS is no SAS: it has no sig=; expected sv=...&sp=rl&sig=..."
elif [[ -z ${AZCOPY_AUTO_LOGIN_TYPE:-} ]]; then
  [[ -n ${AZURE_FEDERATED_TOKEN_FILE:-} ]] ||
    fail 1 "nothing to log in with: no AZURE_STORAGE_SAS, no workload identity (AZURE_FEDERATED_TOKEN_FILE), no \
AZCOPY_AUTO_LOGIN_TYPE; set the credential, $base_hint"
  export AZCOPY_AUTO_LOGIN_TYPE=WORKLOAD
fi
command -v azcopy >/dev/null || fail 1 "azcopy is not installed here; use the image of osmo/Dockerfile"
mkdir -p "$dest" 2>/dev/null || fail 1 "$dest: cannot be made; expected BLOB_DEST_DIR to be a folder to write in"

# The same for each run to this folder, so that what a killed one has left is removed: azcopy's plans and logs.
scratch=${TMPDIR:-/tmp}/download-blob-$(id -u)-$(cksum <<<"$dest" | tr ' ' -)
rm -rf "$scratch"
mkdir -m 700 "$scratch" || fail 1 "$scratch: cannot be made; expected TMPDIR to be a folder to write in"
pid='' door_pid=''
clean_up() {
  [[ -z $door_pid ]] || kill "$door_pid" 2>/dev/null || true
  [[ -z $pid ]] || kill -KILL "$pid" 2>/dev/null || true # on SIGTERM azcopy would ask a question and wait
  [[ -z $pid ]] || wait "$pid" 2>/dev/null || true
  rm -rf "$scratch"
  find "$dest" -name '.azDownload-*' -delete 2>/dev/null || true # of full size: a search for bags would find them
}
trap clean_up EXIT
trap 'fail 75 "stopped by a signal; what arrived stays in $dest, run again to go on"' TERM INT
find "$dest" -name '.azDownload-*' -delete

# -- what there is, and whether it fits ---------------------------------------------------------------------------

# `inventory list` asks the server, in seconds, what azcopy would find out in hours or never; `inventory check`
# compares with it what arrived. Only with a SAS: azcopy alone can use an identity.
inventory() {
  SAS=$sas CONNECT_S=$connect_s python3 - "$1" "$endpoint" "$container" "$prefix" "$dest" "$scratch/blobs.json" <<'PY' &
import datetime, json, os, shutil, sys, time, urllib.error, urllib.parse, urllib.request
import xml.etree.ElementTree as ElementTree

action, endpoint, container, prefix, dest, path = sys.argv[1:]
sas = os.environ["SAS"]
where = f"{endpoint}/{container}/{prefix}"


def fail(code, message):
    print(f"error: download-blob: {where}: {message}", file=sys.stderr)
    sys.exit(code)


def gib(count):
    return f"{count / 2**30:.2f} GiB"


def what_is_wrong_with_the_sas():
    fields = {key: values[0] for key, values in urllib.parse.parse_qs(sas).items()}
    expiry = fields.get("se", "")
    if expiry[:19] and expiry[:19] < datetime.datetime.now(datetime.timezone.utc).isoformat()[:19]:
        return f"it expired at {expiry}; make a new one"
    permissions = fields.get("sp", "rl")  # a SAS with a stored access policy names none
    missing = [name for name in ("Read", "List") if name[0].lower() not in permissions]
    return f"it lacks the permission {' and '.join(missing)}; make one with Read and List" if missing else None


def get(query):
    query = urllib.parse.urlencode(dict(restype="container", comp="list", **query))
    url = f"{endpoint}/{urllib.parse.quote(container)}?{query}&{sas}"
    for attempt in range(3):
        try:
            with urllib.request.urlopen(url, timeout=float(os.environ["CONNECT_S"])) as answer:
                return ElementTree.fromstring(answer.read())
        except urllib.error.HTTPError as error:
            if error.code == 403:
                fail(1, "the SAS is refused; is it of this account and container, and copied whole?")
            if error.code == 404:
                fail(1, f"no container {container}; check AZURE_BLOB_CONTAINER and AZURE_STORAGE_ACCOUNT")
            reason = f"the server answers {error.code}"
            if error.code < 500 and error.code != 429:
                fail(1, f"{reason}; check the SAS and AZURE_BLOB_CONTAINER")
        except Exception as error:  # its text can hold the URL, and with it the SAS: only the reason is shown
            reason = str(getattr(error, "reason", "")).split("?")[0] or type(error).__name__
            if "Name or service not known" in reason or "No address associated" in reason:
                fail(1, f"no such host ({reason}); check AZURE_STORAGE_ACCOUNT")
        time.sleep(1 + attempt)
    fail(75, f"cannot be reached: {reason}; run again when it can")


if action == "list":
    problem = what_is_wrong_with_the_sas()
    if problem:
        fail(1, f"the SAS cannot be used: {problem}")
    blobs, marker = {}, ""
    folder = f"{prefix}/" if prefix else ""
    while True:
        page = get(dict(prefix=folder, marker=marker, include="metadata"))
        for blob in page.iter("Blob"):
            name = blob.find("Name")
            text = urllib.parse.unquote(name.text) if name.get("Encoded") == "true" else name.text
            # An account with a hierarchical namespace lists its folders too, and azcopy makes no empty ones.
            is_folder = text.endswith("/") or "true" in (e.text for e in blob.iter() if e.tag.lower() == "hdi_isfolder")
            if not is_folder:
                # azcopy would write it where the name leads, and the check below would remove what lies there.
                if {"", ".", ".."} & set(text[len(folder) :].split("/")):
                    fail(1, f"the blob {text!r} has no place below {dest}: an empty part, . or .. in it; delete it")
                blobs[text[len(folder) :]] = int(blob.find("Properties/Content-Length").text)
        marker = page.findtext("NextMarker") or ""
        if not marker:
            break
    if not blobs:
        fail(1, "nothing there; check AZURE_BLOB_PREFIX (upper and lower case differ)")
    if not any(name.removesuffix(".zstd").endswith((".db3", ".mcap")) for name in blobs):
        fail(1, f"{len(blobs)} blobs, but no bag (.db3 or .mcap) among them; check AZURE_BLOB_PREFIX")

    def there(name):
        file = os.path.join(dest, name)
        return os.path.isfile(file) and os.path.getsize(file) == blobs[name]

    needed, free = sum(size for name, size in blobs.items() if not there(name)), shutil.disk_usage(dest).free
    print(f"download-blob: {where}: {len(blobs)} blobs, {gib(sum(blobs.values()))}; {gib(needed)} to download")
    if needed > free:
        fail(1, f"{gib(needed)} to download, but {dest} has {gib(free)} free; raise `storage`, or lower the prefix")
    with open(path, "w") as file:
        json.dump(blobs, file)
else:
    with open(path) as file:
        blobs = json.load(file)
    wrong = []
    for name, size in blobs.items():
        file = os.path.join(dest, name)
        if not os.path.isfile(file):
            wrong.append(name)
        elif os.path.getsize(file) != size:
            os.remove(file)
            wrong.append(name)
    if wrong:
        fail(75, f"{len(wrong)} of {len(blobs)} blobs did not arrive whole ({wrong[0]}, ...); run again")
    foreign = [
        os.path.relpath(os.path.join(folder, name), dest)
        for folder, _, names in os.walk(dest)
        for name in names
        if name.removesuffix(".zstd").endswith((".db3", ".mcap"))
    ]
    foreign = sorted(set(foreign) - set(blobs))
    if foreign:
        fail(1, f"{dest} holds bags that are not from there ({foreign[0]}, {len(foreign)} in all); empty it first")
PY
  pid=$!
  local rc=0
  wait "$pid" || rc=$?
  pid=''
  ((rc == 0)) || exit "$rc"
}
[[ -z $sas ]] || inventory list

# -- the download -------------------------------------------------------------------------------------------------

# azcopy takes a SAS only with the URL, among its arguments, which everybody on the machine can read (ps). So its URL is
# one that leads nowhere, and its environment, which only its owner can read, names a proxy: here on loopback, and with a
# password, it redirects each request to the real URL with the SAS. The blobs themselves do not pass through it.
source=$endpoint proxy=''
if [[ -n $sas ]]; then
  exec {door}< <(
    SAS=$sas exec python3 - "$endpoint" <<'PY'
import base64, hmac, http.server, os, secrets, sys, threading, time, urllib.parse

parent = os.getppid()
password = secrets.token_hex(16)
expected = "Basic " + base64.b64encode(f"azcopy:{password}".encode()).decode()


class Door(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        known = hmac.compare_digest(self.headers.get("Proxy-Authorization", "").encode(), expected.encode())
        self.send_response(307 if known else 407)
        if known:
            url = urllib.parse.urlsplit(self.path)
            query = "&".join(filter(None, (url.query, os.environ["SAS"])))
            self.send_header("Location", f"{sys.argv[1]}{url.path}?{query}")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Door)
server.handle_error = lambda *_: None  # azcopy hung up
threading.Thread(target=server.serve_forever, daemon=True).start()
print(f"http://azcopy:{password}@127.0.0.1:{server.server_port}", flush=True)
while os.getppid() == parent:
    time.sleep(1)
PY
  )
  door_pid=$!
  read -r proxy <&"$door" || fail 1 "python3 cannot listen on 127.0.0.1"
  exec {door}<&-
  source=http://blob.invalid # no such host, now or ever (RFC 2606)
fi

export AZCOPY_LOG_LOCATION=$scratch AZCOPY_JOB_PLAN_LOCATION=$scratch
unset AZCOPY_DOWNLOAD_TO_TEMP_PATH # false would leave torn files under their final names
quoted=$(python3 -c 'import sys, urllib.parse; print(urllib.parse.quote(sys.argv[1]))' "$container/$prefix")
mkfifo "$scratch/stdin" # a stdin that blocks: at its end azcopy would spin
(
  if [[ -n $proxy ]]; then
    unset http_proxy
    export HTTP_PROXY=$proxy
    case ,${NO_PROXY:-${no_proxy:-}}, in # no proxy at all: still so for the real URL, but not for this one
      *,\*,*) unset NO_PROXY no_proxy HTTPS_PROXY https_proxy ;;
    esac
  fi
  exec azcopy copy "$source/${quoted%/}" "$dest" --from-to=BlobLocal --recursive --as-subdir=false \
    --exclude-regex='(^|/)[.][.](/|$)' --overwrite=ifSourceNewer --output-level=essential --log-level=ERROR
) <>"$scratch/stdin" >"$scratch/out" 2>&1 &
pid=$!

show_errors() { grep -aiE 'error|fail|denied|space|found' "$scratch/out" | tail -n 8 | sed -E 's/sig=[^&"[:space:]]*/sig=REDACTED/g' >&2 || true; }
# What azcopy has read: the files tell nothing, they have their full size from the start.
received() { sed -n 's/^rchar: //p' "/proc/$pid/io" 2>/dev/null || true; }
counted=0 moved_s=$SECONDS said_s=$SECONDS
while kill -0 "$pid" 2>/dev/null; do
  sleep 1 &
  wait $! || true # not `sleep` alone: a signal is then heeded at once
  now=$(received)
  if [[ -z $now ]] || ((now - counted >= 1048576)); then # less in BLOB_STALL_S is only its own retries
    counted=${now:-0} moved_s=$SECONDS
  fi
  if ((SECONDS - said_s >= 60)); then
    said_s=$SECONDS
    echo "download-blob: about $((${now:-0} / 1048576)) MiB received"
  fi
  if ((SECONDS - moved_s >= stall_s)); then
    show_errors
    fail 75 "$where: nothing has arrived for $stall_s s (BLOB_STALL_S); run again to go on"
  fi
  ((SECONDS < timeout_s)) || # begun again from nothing, as in a new pod, it would not be complete then either
    fail 1 "$where: not complete after $timeout_s s; raise blob_timeout_s of the workflow (BLOB_TIMEOUT_S)"
done
rc=0
wait "$pid" || rc=$?
pid=''
if ((rc)); then
  show_errors
  if grep -aqi 'no space left' "$scratch/out" "$scratch"/*.log; then
    fail 1 "$dest is full; raise \`storage\` of the workflow"
  elif grep -aqE 'The specified (file was not found|container does not exist)|RESPONSE 404' "$scratch/out"; then
    fail 1 "$where: nothing there; check AZURE_STORAGE_ACCOUNT, AZURE_BLOB_CONTAINER and AZURE_BLOB_PREFIX"
  elif grep -aqE 'RESPONSE 40[13]|AuthenticationFailed|AuthorizationFailure|AADSTS|[Ll]ogin|[Cc]redential' "$scratch/out"; then
    fail 1 "$where: azcopy was refused; see its lines above; the identity needs the role Storage Blob Data Reader"
  fi
  fail 75 "$where: azcopy failed with exit code $rc; see its lines above; run again to go on"
fi

# -- what arrived -------------------------------------------------------------------------------------------------

[[ -z $sas ]] || inventory check
bags=$(find "$dest" \( -name metadata.yaml -o -name '*.mcap*' -o -name '*.db3*' \) -printf '%h\n' | sort -u | wc -l)
((bags)) || fail 1 "$where: no bag arrived (no metadata.yaml, .mcap or .db3); check AZURE_BLOB_PREFIX"
echo "download-blob: $bags folders with bags in $dest after $SECONDS s"
if (($#)); then
  clean_up
  trap - EXIT TERM INT
  exec "$@"
fi
