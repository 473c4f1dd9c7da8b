"""Make the man pages and the bash completion from the argument tree: tools.documents [FOLDER].

dgx-kvm.1 and the completion come from dgx_kvm_sw.cli, vms.yaml.5 from the schema of the file, so
none of them can say what the program does not do.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from dgx_kvm_sw.cli.arguments import Parser, actions_of, tree
from dgx_kvm_sw.cli.overview import DESCRIPTION, EXAMPLES, EXIT_CODES, USAGE
from dgx_kvm_sw.cli.verbs import EVERYWHERE, PLATFORMS, VERBS
from dgx_kvm_sw.cli.version import version
from dgx_kvm_sw.guest.schema import schema_text

FILES = (
    ("/etc/dgx-kvm/vms.yaml", "the VMs of this host; see vms.yaml(5)"),
    ("/etc/dgx-kvm/vms.d/*.yaml", "more VMs; dgx-kvm create writes one file for each"),
    ("/etc/dgx-kvm/templates/N-gpu.yaml", "what a VM with N GPUs gets besides them"),
    ("/etc/dgx-kvm/templates/domain.xml.j2", "the libvirt domain of a VM, as a Jinja template"),
    ("/etc/dgx-kvm/templates/cloud-init.yaml.j2", "what guests are told at their first boot"),
    (
        "/etc/dgx-kvm/hooks.d/vm-seed/",
        "programs to run before a VM's first boot settings are written, in the order of their"
        " names, for 60 s at most each; they may edit the files in $DGX_KVM_SEED_DIR. They get"
        " DGX_KVM_STAGE (vm-seed), DGX_KVM_VM, DGX_KVM_UUID, DGX_KVM_TENANT and DGX_KVM_IMAGE."
        " One that fails stops this VM alone. What hooks print is kept in the journal, so it must"
        " not be secret; they must not call dgx-kvm to change anything",
    ),
    (
        "/etc/dgx-kvm/hooks.d/vm-start/",
        "the same before each start of a VM, when its devices are ready, with DGX_KVM_STAGE,"
        " DGX_KVM_VM, DGX_KVM_UUID, DGX_KVM_GPUS and DGX_KVM_DEVICES, PCI addresses with blanks"
        " between",
    ),
    ("/var/lib/dgx-kvm/images/", "the disks of the VMs; never removed unasked"),
    ("/var/lib/dgx-kvm/bases/", "what disks that were made from images lie on; imported images"),
    ("/usr/share/dgx-kvm/images.d/*.json", "manifests of images from packages"),
    ("/var/lib/dgx-kvm/images.d/*.json", "manifests of imported images"),
    (
        "/etc/dgx-kvm/hooks.d/STAGE/",
        "your own programs, run in the order of their names when an image has come (image-added)"
        " or gone (image-removed), with DGX_KVM_STAGE, DGX_KVM_IMAGE, DGX_KVM_IMAGE_VERSION and"
        " DGX_KVM_IMAGE_PATH in their environment",
    ),
    ("/var/lib/dgx-kvm/health.json", "devices that are to stay out of use"),
    ("/var/lib/dgx-kvm/journal.jsonl", "what was done, when, with which result"),
)
EXAMPLE_FILE = """\
version: 1
tenants:
  hr: {max_gpus: 4}
defaults:
  image: debian-12
  networks: [{bridge: br0}]
vms:
  - {name: hr-train, tenant: hr, gpus: 2, memory: 160GiB}
  - name: rapids
    gpus: 8
    disks: [{name: data, size: 500GiB}]
  - {name: build, gpus: 0, vcpus: 4, memory: 8GiB, state: stopped}
"""
# Debian 12's shtab offers only the first of several choices, hence a script of our own.
_COMPLETION = r"""# bash completion of dgx-kvm; made by tools.documents from the argument tree

_dgx_kvm_names() {
  local words="${COMP_WORDS[*]} " folder=/etc/dgx-kvm
  if [[ $words =~ --simulate[=\ ]+([a-z0-9-]+) ]]; then
    local machine=${XDG_STATE_HOME:-$HOME/.local/state}/dgx-kvm/${BASH_REMATCH[1]}
    [[ $words =~ --state[=\ ]+([^ ]+) ]] && machine=${BASH_REMATCH[1]}
    folder=$machine$folder
  fi
  cat "$folder/vms.yaml" "$folder"/vms.d/*.yaml 2>/dev/null |
    sed -n '/gpus:/!{/size:/d}; s/^ *-\{0,1\} *{\{0,1\} *name: *"\{0,1\}\([a-z0-9-]*\).*/\1/p'
}

_dgx_kvm_images() {
  ls /usr/share/dgx-kvm/images.d /var/lib/dgx-kvm/images.d 2>/dev/null | sed -n 's/\.json$//p'
}

_dgx_kvm() {
  local word=${COMP_WORDS[COMP_CWORD]} before=${COMP_WORDS[COMP_CWORD-1]} verb='' i
  COMPREPLY=()
  for ((i = 1; i < COMP_CWORD; i++)); do
    case ${COMP_WORDS[i]} in
      @TAKES_VALUE@) ((i++)) ;;
      -*) ;;
      *) verb=${verb:+$verb }${COMP_WORDS[i]}; [[ $verb == @HAS_ACTIONS@ ]] || break ;;
    esac
  done
  case $before in
    --simulate) mapfile -t COMPREPLY < <(compgen -W '@PLATFORMS@' -- "$word"); return ;;
    @TAKES_FILE@) compopt -o default; return ;;
    @TAKES_DIR@) compopt -o dirnames; return ;;
    @TAKES_WORD@) return ;;
  esac
  local words=''
  case $verb in
@VERBS@
  esac
  mapfile -t COMPREPLY < <(compgen -W "$words" -- "$word")
}

complete -F _dgx_kvm dgx-kvm
"""


def main(arguments: list[str]) -> int:
    folder = Path(arguments[0] if arguments else "build")
    (folder / "bash-completion").mkdir(parents=True, exist_ok=True)
    (folder / "dgx-kvm.1").write_text(manual_page())
    (folder / "vms.yaml.5").write_text(format_page())
    (folder / "bash-completion/dgx-kvm").write_text(bash_completion())
    return 0


# -- roff ---------------------------------------------------------------------------------------


def roff(text: str) -> str:
    """Return text that prints as it is: hyphens that can be copied, no accidental requests."""
    text = text.replace("\\", "\\e").replace("-", "\\-")
    return re.sub(r"^([.'])", r"\\&\1", text, flags=re.MULTILINE)


def bold(text: str) -> str:
    return f"\\fB{roff(text)}\\fR"


def item(head: str, text: str) -> str:
    return f".TP\n{head}\n{roff(text)}"


def verbatim(lines: Iterable[str]) -> str:
    return "\n".join((".PP", ".nf", ".RS", *(roff(line) for line in lines), ".RE", ".fi"))


def page(name: str, section: int, title: str, body: Iterable[str]) -> str:
    head = f'.TH {name.upper()} {section} "" "dgx-kvm-sw {version()}"'
    return "\n".join((head, ".SH NAME", f"{roff(name)} \\- {roff(title)}", *body)) + "\n"


# -- dgx-kvm(1) ---------------------------------------------------------------------------------


def manual_page() -> str:
    _, parsers = tree()
    title = "GPU virtual machines on NVIDIA DGX servers, from one declarative file"
    return page("dgx-kvm", 1, title, _manual(parsers))


def _manual(parsers: dict[str, Parser]) -> Iterator[str]:
    yield f".SH SYNOPSIS\n{bold('dgx-kvm')} {roff(USAGE.partition(' ')[2])}"
    yield f".SH DESCRIPTION\n{roff(DESCRIPTION)}"
    yield ".SH VERBS"
    for verb in VERBS:
        parser = parsers[verb.name]
        yield f".SS {roff(_synopsis(parser))}"
        yield roff(f"{verb.title[0].upper()}{verb.title[1:]}.\n{verb.about}".rstrip())
        yield from _options(parser)
        for _, action in actions_of(parser):
            yield f".SS {roff(_synopsis(action))}\n{roff(action.description or '')}"
            yield from _options(action)
        yield verbatim(verb.examples)
    yield ".SH OPTIONS\nThese stand before or after any verb."
    for names, metavar, text in EVERYWHERE:
        yield item(f"{', '.join(bold(name) for name in names)} {_argument(metavar)}".rstrip(), text)
    yield ".SH EXIT STATUS\nThe same number means the same with every verb."
    yield from (item(bold(str(code)), meaning) for code, meaning in EXIT_CODES)
    yield ".SH FILES"
    yield from (item(f"\\fI{roff(path)}\\fR", text) for path, text in FILES)
    yield ".SH ENVIRONMENT"
    yield item(bold("NO_COLOR"), "if not empty, print without colours")
    yield item(bold("XDG_STATE_HOME"), "where simulated machines live, instead of ~/.local/state")
    yield ".SH EXAMPLES"
    yield verbatim(EXAMPLES)
    yield ".SH SEE ALSO\n.BR vms.yaml (5),\n.BR virsh (1),\n.BR libvirtd (8)"


def _options(parser: Parser) -> Iterator[str]:
    for action in _own_options(parser):
        if not isinstance(action, argparse._SubParsersAction):
            yield item(_head(action), action.help or "")


def _synopsis(parser: Parser) -> str:
    words = [parser.prog, "[OPTION]..."]
    for action in _own_options(parser):
        if not action.option_strings:
            optional = {"?": f"[{action.metavar}]", "*": f"[{action.metavar}]..."}
            words.append(optional.get(str(action.nargs), str(action.metavar)))
        elif action.required:
            words.append(f"{action.option_strings[-1]} {action.metavar}")
    return " ".join(words)


def _own_options(parser: Parser) -> list[argparse.Action]:
    """The arguments and options of a verb, without --help and what all verbs share."""
    shared = {name for names, _, _ in EVERYWHERE for name in names} | {"--help"}
    return [action for action in parser._actions if not shared & set(action.option_strings)]


def _head(action: argparse.Action) -> str:
    names = ", ".join(bold(name) for name in action.option_strings)
    takes_value = action.nargs != 0
    return f"{names} {_argument(str(action.metavar)) if takes_value else ''}".strip()


def _argument(metavar: str) -> str:
    return f"\\fI{roff(metavar)}\\fR" if metavar else ""


# -- vms.yaml(5) --------------------------------------------------------------------------------


def format_page() -> str:
    schema = json.loads(schema_text("vms"))
    return page("vms.yaml", 5, "the virtual machines of a dgx-kvm host", _format(schema))


def _format(schema: dict[str, Any]) -> Iterator[str]:
    definitions = schema["definitions"]
    properties = schema["properties"]
    yield f".SH DESCRIPTION\n{roff(schema['description'])}"
    yield ".SH KEYS OF THE FILE"
    for key, value in properties.items():
        yield _key(key, value, definitions)
    for key in ("reserve", "cpu_pool"):
        section = properties["host"]["properties"][key]["properties"]
        yield from (_key(f"host.{key}.{name}", v, definitions) for name, v in section.items())
    tenant = properties["tenants"]["additionalProperties"]["properties"]
    yield from (_key(f"tenants.NAME.{name}", v, definitions) for name, v in tenant.items())
    yield ".SH KEYS OF A VM"
    for key, value in definitions["vm"]["properties"].items():
        yield _key(key, value, definitions)
        parts = value.get("items", {}).get("properties", {})
        yield from (_key(f"{key}[].{name}", part, definitions) for name, part in parts.items())
    yield ".SH SIZES\nA size is a number and KiB, MiB, GiB or TiB: 160GiB. A share is 50%."
    yield ".SH EXAMPLE"
    yield verbatim(EXAMPLE_FILE.splitlines())
    yield ".SH SEE ALSO\n.BR dgx\\-kvm (1)"


def _key(name: str, value: dict[str, Any], definitions: dict[str, Any]) -> str:
    if "$ref" in value:
        value = {**definitions[value["$ref"].rpartition("/")[2]], **value}
    text = value.get("description", "")
    if "enum" in value and not all(str(option) in text for option in value["enum"]):
        text += f" One of {', '.join(map(str, value['enum']))}."
    elif "title" in value:
        text += f" It is {value['title']}."
    if "default" in value:
        text += f" Default: {value['default']}."
    return item(bold(name), text)


# -- completion ---------------------------------------------------------------------------------


def bash_completion() -> str:
    parser, parsers = tree()
    actions = [action for each in (parser, *parsers.values()) for action in each._actions]
    verbs = [_completion_of(name, parsers[name]) for name in parsers]
    completed = ("FILE", "DIR", "PLATFORM")
    names = [name for name in parsers if " " not in name]
    start = f"{' '.join(names)} {_names_of(parser._actions)}"
    values = {
        "@TAKES_VALUE@": _pattern(actions, lambda action: action.nargs != 0),
        "@TAKES_FILE@": _pattern(actions, lambda action: action.metavar == "FILE"),
        "@TAKES_DIR@": _pattern(actions, lambda action: action.metavar == "DIR"),
        "@TAKES_WORD@": _pattern(
            actions, lambda action: action.nargs != 0 and action.metavar not in completed
        ),
        "@PLATFORMS@": " ".join(PLATFORMS),
        "@HAS_ACTIONS@": next(name for name in names if actions_of(parsers[name])),
        "@VERBS@": "\n".join((f"    '') words='{start}' ;;", *verbs)),
    }
    text = _COMPLETION
    for mark, value in values.items():
        text = text.replace(mark, value)
    return text


def _completion_of(verb: str, parser: Parser) -> str:
    """Return what may stand after a verb: options behind a hyphen, else names or files."""
    positional = [a.metavar for a in parser._actions if not a.option_strings]
    rest = ":"
    if choices := [
        word for a in parser._actions if not a.option_strings for word in a.choices or ()
    ]:
        rest = f"words='{' '.join(choices)}'"
    elif "IMAGE" in positional:
        rest = "words=$(_dgx_kvm_images)"
    elif "NAME" in positional and verb != "create":
        rest = "words=$(_dgx_kvm_names)"
    elif "FILE" in positional:
        rest = "compopt -o default"
    options = f"words='{_names_of(parser._actions)}'"
    return f"    '{verb}') if [[ $word == -* ]]; then {options}; else {rest}; fi ;;"


def _names_of(actions: Iterable[argparse.Action]) -> str:
    return " ".join(name for a in actions for name in a.option_strings if name[:2] == "--")


def _pattern(actions: Iterable[argparse.Action], wanted: Callable[[argparse.Action], bool]) -> str:
    names = (name for action in actions if wanted(action) for name in action.option_strings)
    return "|".join(dict.fromkeys(names))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
