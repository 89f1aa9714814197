"""What pyproject.toml cannot say: the wheel has the configurations, for `metricconv compare --config quickstart`."""

from setuptools import setup
from setuptools.command.build_py import build_py


class WithConfigurations(build_py):
    def run(self):
        super().run()
        if not self.editable_mode:  # which finds them beside the package
            self.copy_tree("configs", f"{self.build_lib}/timm_metricconv/configs")


setup(cmdclass={"build_py": WithConfigurations})
