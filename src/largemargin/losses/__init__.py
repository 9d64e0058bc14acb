"""The losses as modules. A loss that is a formula on the statistics is a function here too; :mod:`.rows` has the base of both."""
