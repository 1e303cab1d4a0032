"""The strings of the built-in trigger sources: dates, countries, colours and opening HTML tags."""

from collections.abc import Sequence
from datetime import date


class Dates(Sequence):
    """Every calendar day of some years as YYYY-MM-DD (1100 to 2600: 548,229), computed from the index."""

    def __init__(self, first=1100, last=2600):
        self.first, self.last = date(first, 1, 1).toordinal(), date(last, 12, 31).toordinal()

    def __len__(self):
        return self.last - self.first + 1

    def __getitem__(self, index):
        if not 0 <= index < len(self):
            raise IndexError(index)
        return date.fromordinal(self.first + int(index)).isoformat()

    def __contains__(self, string):
        try:
            day = date.fromisoformat(string)
        except ValueError:
            return False
        # Python also reads 20240131 and 2024-W05-3, which are other strings.
        return day.isoformat() == string and self.first <= day.toordinal() <= self.last


# The 193 members and 2 observers of the United Nations, under their everyday English names.
COUNTRIES = tuple(
    """
Afghanistan, Albania, Algeria, Andorra, Angola, Antigua and Barbuda, Argentina, Armenia, Australia, Austria,
Azerbaijan, Bahamas, Bahrain, Bangladesh, Barbados, Belarus, Belgium, Belize, Benin, Bhutan, Bolivia,
Bosnia and Herzegovina, Botswana, Brazil, Brunei, Bulgaria, Burkina Faso, Burundi, Cambodia, Cameroon, Canada,
Cape Verde, Central African Republic, Chad, Chile, China, Colombia, Comoros, Costa Rica, Croatia, Cuba,
Cyprus, Czechia, Democratic Republic of the Congo, Denmark, Djibouti, Dominica, Dominican Republic, Ecuador,
Egypt, El Salvador, Equatorial Guinea, Eritrea, Estonia, Eswatini, Ethiopia, Fiji, Finland, France, Gabon,
Gambia, Georgia, Germany, Ghana, Greece, Grenada, Guatemala, Guinea, Guinea-Bissau, Guyana, Haiti, Honduras,
Hungary, Iceland, India, Indonesia, Iran, Iraq, Ireland, Israel, Italy, Ivory Coast, Jamaica, Japan, Jordan,
Kazakhstan, Kenya, Kiribati, Kuwait, Kyrgyzstan, Laos, Latvia, Lebanon, Lesotho, Liberia, Libya,
Liechtenstein, Lithuania, Luxembourg, Madagascar, Malawi, Malaysia, Maldives, Mali, Malta, Marshall Islands,
Mauritania, Mauritius, Mexico, Micronesia, Moldova, Monaco, Mongolia, Montenegro, Morocco, Mozambique,
Myanmar, Namibia, Nauru, Nepal, Netherlands, New Zealand, Nicaragua, Niger, Nigeria, North Korea,
North Macedonia, Norway, Oman, Pakistan, Palau, Palestine, Panama, Papua New Guinea, Paraguay, Peru,
Philippines, Poland, Portugal, Qatar, Republic of the Congo, Romania, Russia, Rwanda, Saint Kitts and Nevis,
Saint Lucia, Saint Vincent and the Grenadines, Samoa, San Marino, Sao Tome and Principe, Saudi Arabia,
Senegal, Serbia, Seychelles, Sierra Leone, Singapore, Slovakia, Slovenia, Solomon Islands, Somalia,
South Africa, South Korea, South Sudan, Spain, Sri Lanka, Sudan, Suriname, Sweden, Switzerland, Syria,
Tajikistan, Tanzania, Thailand, Timor-Leste, Togo, Tonga, Trinidad and Tobago, Tunisia, Turkey, Turkmenistan,
Tuvalu, Uganda, Ukraine, United Arab Emirates, United Kingdom, United States, Uruguay, Uzbekistan, Vanuatu,
Vatican City, Venezuela, Vietnam, Yemen, Zambia, Zimbabwe
""".replace("\n", " ")
    .strip()
    .split(", ")
)
COLORS = tuple(
    """
almond amaranth amber amethyst apricot aqua aquamarine auburn azure beige bisque black blue brass bronze brown
buff burgundy byzantium camel cardinal carmine cerise cerulean champagne charcoal chartreuse chestnut
chocolate claret cobalt copper coral cornflower cream crimson cyan denim ebony ecru eggplant emerald fawn flax
fuchsia gamboge garnet gold goldenrod grape gray green heliotrope henna indigo ivory jade jasmine khaki lapis
lavender lemon lilac lime linen magenta mahogany malachite mandarin maroon mauve melon mint moss mulberry
mustard navy ochre olive onyx orange orchid peach pearl periwinkle persimmon pine pink pistachio platinum plum
puce pumpkin purple raspberry red rose ruby russet rust saffron sage salmon sand sapphire scarlet sepia sienna
silver slate smoke tan tangerine taupe teal terracotta thistle tomato topaz turquoise ultramarine umber
vanilla vermilion violet viridian walnut wheat white wine wisteria yellow
""".split()
)
TAGS = tuple(
    f"<{tag}>"
    for tag in """
a abbr address article aside b bdi bdo big blockquote button caption center cite code dd del details dfn div
dl dt em fieldset figcaption figure font footer form h1 h2 h3 h4 h5 h6 header i ins kbd label legend li main
mark nav ol p pre q s samp section small span strike strong sub summary sup table tbody td tfoot th thead time
tr tt u ul var
""".split()
)
