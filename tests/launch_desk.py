"""What the tests of the launch scripts share: command lines, and stand-ins for the commands of the clouds."""

import os
import pathlib
import shlex
import subprocess
import time

LAUNCH = pathlib.Path(__file__).parent.parent / "launch"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
CODE = f"--git-url=https://example.org/alice.git --commit={COMMIT}"
TPU = "tpu_vm.sh --name=alice --project=p --zone=z --accelerator-type=v5litepod-16 --runtime-version=v --bucket=b"
GKE = "gke.sh --name=alice --context=c --bucket=b"
SLURM = "slurm.sh --name=alice --folder=/shared/alice"
BATCH = "batch.sh --name=alice --project=p --location=l --machine-type=n2-standard-8 --bucket=b --tasks=100"
TRAIN = "train --config=configs/pretrain.py:pod --config.data.store=/mnt/bucket/store --workdir=/mnt/bucket/runs/alice"
EMBED = "embed --store=/mnt/bucket/store --workdir='/mnt/bucket/it'\\''s mine'"
# What the stand-in for Python says of EMBED, in front of the share.
RAN = ["asked for", "-m", "alice_jax.embed", "--store=/mnt/bucket/store", "--workdir=/mnt/bucket/it's mine"]
PREPARE = "prepare --input=/mnt/bucket/scans --store=/mnt/bucket/store"

ONE_HOST = {"tpu-vm list": ["READY 1"]}


class Desk:
    """An empty folder, with stand-ins on the PATH that note how they are called.

    `answers` maps words of a call to what one such call after the other prints. The last answer stays, "FAIL" fails,
    "WAIT" takes a minute.
    """

    STAND_IN = """#!/bin/bash
echo "$(basename "$0") $*" >> "$DESK/calls"
for file in "$DESK"/answers/*; do
  [ -e "$file" ] || continue
  read -r words < "$file"
  if [[ "$(basename "$0") $*" == *$words* ]]; then
    answer=$(sed -n 2p "$file")
    [ "$(wc -l < "$file")" -le 2 ] || sed -i 2d "$file"
    [ "$answer" != FAIL ] || exit 1
    case $answer in WAIT) exec sleep 60 ;; *) echo -e "$answer" ;; esac
    exit
  fi
done
"""

    def __init__(self, folder):
        self.folder = folder
        (folder / "answers").mkdir()
        (folder / "bin").mkdir()
        for name in ("gcloud", "kubectl", "sbatch", "srun", "scancel"):
            self.stand_in(name, self.STAND_IN)
        self.environment = {
            "PATH": f"{folder}/bin:{os.environ['PATH']}",
            "HOME": str(folder),
            "DESK": str(folder),
            "ALICE_JAX_POLL": "0",
        }

    def stand_in(self, name, text):
        path = self.folder / "bin" / name
        path.write_text(text)
        path.chmod(0o755)

    def answers(self, answers):
        for index, (words, lines) in enumerate((ONE_HOST | answers).items()):
            (self.folder / "answers" / f"{index:02}").write_text("\n".join([words, *lines]) + "\n")

    @property
    def calls(self):
        path = self.folder / "calls"
        return path.read_text().splitlines() if path.exists() else []

    def did(self, *parts):
        """The calls, as those of these parts that each holds, without repetition."""
        found = [part for call in self.calls for part in parts if part in call]
        return [part for index, part in enumerate(found) if index == 0 or found[index - 1] != part]

    def command(self, line, code=CODE):
        script, *arguments = shlex.split(line)
        return [str(LAUNCH / script), *shlex.split(code), *arguments]

    def run(self, line, code=CODE, **environment):
        return subprocess.run(
            self.command(line, code),
            cwd=self.folder,
            env=self.environment | environment,
            capture_output=True,
            encoding="utf-8",
            timeout=120,
        )

    def start(self, line, **options):
        # A shell's background jobs, in which tests may run, ignore Ctrl-C, and so would their children.
        command = ["env", "--default-signal=INT", *self.command(line)]
        return subprocess.Popen(command, cwd=self.folder, env=self.environment, **options)

    def wait_for(self, part):
        until = time.time() + 60
        while not any(part in call for call in self.calls):
            assert time.time() < until, f"{part} was never called: {self.calls}"
            time.sleep(0.05)

    def project(self):
        """Makes a repository of two commits and stand-ins for pip and Python; the options that ask for the first."""
        folder = self.folder / "project"
        (folder / "launch").mkdir(parents=True)
        self.stand_in("pip", '#!/bin/bash\necho "pip $*"\n')
        self.stand_in("python", '#!/bin/bash\nprintf "%s\\n" "$(cat which)" "$@"\n')
        (folder / "launch" / "environment.sh").write_text(
            'cd "$(dirname "${BASH_SOURCE[0]}")/.."\nmake_environment() { echo "extra: $1"; }\n'
        )

        def git(*arguments):
            identity = ["-c", "user.name=n", "-c", "user.email=e"]
            done = subprocess.run(
                ["git", "-C", folder, *identity, *arguments], check=True, capture_output=True, encoding="utf-8"
            )
            return done.stdout.strip()

        git("init", "--quiet")
        for which in ("asked for", "newer"):
            (folder / "which").write_text(which)
            git("add", ".")
            git("commit", "--quiet", "--message", which)
        return f"--git-url={folder} --commit={git('rev-parse', 'HEAD~')}"
