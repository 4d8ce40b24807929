"""Add-ons that are asked for: what they need comes first, and what their manifests run is what is built for them."""

import re
from itertools import permutations

import pytest
import yaml

from infra.clouds.local import AddOn
from infra.clouds.local.addons import FOLDER
from infra.clouds.local.cluster import reference_of
from infra.clouds.local.golang import TOOLS
from infra.clouds.local.options import OPTIONS, with_needs


@pytest.mark.parametrize("names", list(permutations(AddOn)))
def test_what_an_add_on_needs_comes_before_it_and_once(names: tuple[AddOn, ...]) -> None:
    ordered = with_needs(names)
    assert sorted(ordered) == sorted(AddOn)
    for place, name in enumerate(ordered):
        assert set(OPTIONS[name].needs) <= set(ordered[:place])
    assert with_needs([AddOn.KEDA]) == (AddOn.MONITORING, AddOn.KEDA)


@pytest.mark.parametrize("name", AddOn)
def test_its_manifests_run_what_is_built_for_it(name: AddOn) -> None:
    option, text = OPTIONS[name], (FOLDER / f"{name}.yaml").read_text()
    images = {reference_of(image) for image in option.programs}
    assert all(image in text for image in images)
    for document in yaml.safe_load_all(text):
        if document["kind"] == "Deployment":
            (container,) = document["spec"]["template"]["spec"]["containers"]
            assert container["image"] in images
            assert container["imagePullPolicy"] == "Never"
            assert container["securityContext"]["readOnlyRootFilesystem"]
    spaces = {d["metadata"]["name"] for d in yaml.safe_load_all(text) if d["kind"] == "Namespace"}
    assert spaces == {name}, "by its namespace one sees that it is there"


@pytest.mark.parametrize("name", AddOn)
def test_programs_and_kinds_are_of_one_pinned_version(name: AddOn) -> None:
    option = OPTIONS[name]
    for module in {module for module, _ in option.programs.values()} | {option.kinds.tool}:
        pinned = (TOOLS / module / "go.mod").read_text()
        built = set(re.findall(r"^(?:tool |\t)\S+/cmd/(\S+)$", pinned, re.MULTILINE))
        assert built == {program for of, program in option.programs.values() if of == module}
    pinned = (TOOLS / option.kinds.tool / "go.mod").read_text()
    assert re.search(rf"^(?:require |\t){re.escape(option.kinds.module)} v", pinned, re.MULTILINE)
