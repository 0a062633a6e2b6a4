"""Common English words of 3 to 8 lowercase ASCII letters, chosen for this project; no word is in both lists.

Keys are "adjective-noun"; a change of either list changes every generated case.
"""

_ADJECTIVES = """
able agile alert alpine amber ample ancient angular apt aqua arctic ashen autumn avid azure bare bashful basic
beige big bitter black bland blank bleak blind blond blue blunt bold bony brave breezy brief bright brisk broad
bronze brown bulky bumpy burly busy calm candid careful casual cheery chief chilly chosen chubby civil clean
clear clever close cloudy coarse cold comic compact cool copper coral cosmic costly cozy creamy crimson crisp
cubic curious curly curved daily damp dapper daring dark dear deep deft dense dim direct distant dizzy double
drab dreamy drowsy dry dual dull dusky dusty eager early earnest earthy easy ebony elder elegant empty endless
equal even exact exotic extra faded faint fair faithful famous fancy far fast feeble fertile few fickle fierce
fiery final fine firm fit flat fleet fluffy foggy fond formal fragile frank free fresh frosty frozen frugal full
funny fuzzy gentle giant giddy gifted glad gleaming glossy golden good grand grassy grave gray great green grim
gruff handy happy hardy harsh hasty hazel hazy heavy hidden high hollow honest humble hungry hushed icy ideal
idle indigo inner ivory jade jagged jolly jovial joyful junior keen kind known lanky large late lavish lazy
leafy lean level light lilac lime limp linear little lively local lofty lone long loose loud lovely low loyal
lucid lucky lunar lush magenta magic major marble maroon mellow merry mighty mild minor misty modern modest
moist mossy muddy muted narrow native neat new nimble noble noisy normal northern novel oaken odd olive opal
open orange outer oval pale past patient peachy pearly placid plain pleasant plucky plump polite prime proud
prudent puffy pure purple quaint quick quiet rapid rare raw ready red regal remote rich rigid ripe roomy rosy
rough round royal ruby rugged rural russet rusty safe salty sandy scarlet scenic serene shaggy shallow sharp
shiny short shy silent silky silver simple sincere sleek sleepy slender slim slow sly small smart smooth snowy
soft solar solid sour spare spicy spiral spry square stable steady steep sterling stern stiff still stout strict
strong sturdy subtle sunny super supple sure sweet swift tall tame tan tart tasty teal tender thick thin thrifty
tidy tight timid tiny tough tranquil true trusty upbeat upper urban useful vague valiant vast velvet violet
vivid warm wary wavy weary western whole wide wild windy winged winter wise witty wooden woolly young zesty
"""

_NOUNS = """
acorn acre actor album alley almond anchor ankle ant antler anvil apple apron arch arena arrow artist atlas
attic aunt author avenue axe bacon badge badger bagel baker ball balloon banana banner barn barrel basin basket
bat bay beach bead beam bean bear beaver bed bee beetle bell belt bench berry bike birch bird biscuit blanket
blossom board boat bonnet book boot border bottle bowl box branch bread breeze brick bridge brook broom brother
brush bucket bugle bus butter button cabin cactus cake camel camera camp canal candle canoe canvas canyon cape
captain car card cargo carpet carrot cart castle cat cave cedar cello chain chair chalk channel chapel cheese
cherry chest chicken child chimney choir church cider circle city clam clay cliff clock cloth cloud clover coach
coast coat cobra coffee coin comet compass cook cookie cork corn corner cottage cotton couch cougar cousin cove
cow crab cradle crane crate crater creek cricket crow crown crystal cup curtain daisy dancer deer desert desk
diamond dinner dish dock doctor dog doll dolphin donkey door dove dragon drawer dress drum duck eagle ear
earring east egg elbow elk elm ember engine falcon farm farmer feather fence fern ferry fiddle field fig finch
finger fire fish flag flame flock flower flute foam foot forest fork fort fountain fox frame frog fruit galaxy
garden garlic gate gazelle geyser ginger giraffe glacier glass globe glove goat goose grape grass gravel guitar
gull hall hammer hammock hamster harbor hare harp harvest hat hawk hedge helmet hen heron hill hinge honey hood
hook horn horse hotel house hut iguana ink inlet iris iron island jacket jaguar jar jasmine jelly jewel judge
jug jungle kettle key king kite kitten knee knife knight knot ladder lady lagoon lake lamb lamp lantern lark
laurel lawn leaf lemon lentil leopard letter library lily lion lizard llama lobster lock locket log lotus lynx
magnet magpie mango mantle map maple market marsh mask mast meadow medal melon mill mint mirror mitten moon
moose moss moth motor mountain mouse museum mushroom napkin neck needle nest net night north notebook nurse oak
oar oasis oat ocean onion orbit orchard orchid otter oven owl oyster paddle page painter palace palm panda
panther paper parade parcel park parrot pasture path peach peacock pear pearl pebble pelican pen pencil penguin
pepper phone piano picnic pigeon pillow pilot pine pipe pirate planet plate plaza plum pocket poet pond pony
poplar poppy porch port potato prairie prince pump pumpkin puppy puzzle quail quarry queen quill quilt rabbit
raccoon radio raft rail rain raisin ranch raven reef ribbon rice ring river road robin robot rocket roof room
rooster rope rose rug saddle sail sailor salad salmon sand sandal satin saucer scarf school sea seal seed shadow
shark sheep shelf shell shield ship shirt shoe shore shovel shrimp singer sister sky sled snail snake soap sock
sofa soldier song soup south spade sparrow spider spoon spring spruce squash squid stage star station statue
stone stork storm stove street sugar summer swan sweater table tailor teacher teapot temple tent theater thistle
throne thumb ticket tiger timber toad toast tomato tower town trail train tray treasure tree trumpet trunk tulip
tunnel turkey turnip turtle uncle valley vase vessel village vine violin volcano wagon walnut walrus water wave
well west whale wheat wheel whistle willow window wing wizard wolf wood wool wren yacht yard yarn zebra
"""

ADJECTIVES = tuple(_ADJECTIVES.split())
NOUNS = tuple(_NOUNS.split())
