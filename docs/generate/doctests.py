"""A doctest in a docstring is shown as code, wherever it stands."""

import griffe


class Doctests(griffe.Extension):
    def on_object(self, *, obj, **_):
        if obj.docstring and "\n>>> " in obj.docstring.value and "Examples:" not in obj.docstring.value:
            text, _, code = obj.docstring.value.partition("\n>>> ")
            lines = f">>> {code}".splitlines()
            obj.docstring.value = text + "\nExamples:\n" + "\n".join(f"    {line}" for line in lines)
